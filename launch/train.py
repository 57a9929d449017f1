"""Entry point for launchers: the same as ``dist-peft train``.

python launch/train.py --config FILE [key.sub=value ...]
torchrun --nproc_per_node 8 launch/train.py --config FILE
deepspeed launch/train.py --config FILE
srun python launch/train.py --config FILE
mpirun -n 8 python launch/train.py --config FILE
"""

import sys

from dist_peft.app.entry_point import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
