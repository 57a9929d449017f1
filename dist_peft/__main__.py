"""``python -m dist_peft VERB``, which is ``dist-peft VERB``."""

import sys

from dist_peft.app.entry_point import main

if __name__ == "__main__":
    sys.exit(main())
