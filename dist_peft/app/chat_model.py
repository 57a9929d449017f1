"""A loaded model that answers prompts: of a run, sharded or in one process, or a finished model.

===============  ==========================================  ===================================
source           one process                                 several ranks
===============  ==========================================  ===================================
``--run DIR``    base and adapter of a checkpoint, as they   the same, the base sharded with
                 were trained                                FSDP2
``--model DIR``  ``transformers`` alone, as its users load   loaded and sharded as a base without
                 it; GGUF files too                          an adapter
===============  ==========================================  ===================================
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_peft.adapters.adapter_switch import can_disable_adapter, disable_adapter
from dist_peft.app.base_content import read_checkpoint_bases
from dist_peft.app.checkpoint_adapter import ChatFiles, read_chat_files
from dist_peft.app.model_setup import (
    LoadedModel,
    build_model,
    load_init_factors,
    load_training_state,
    load_weights,
)
from dist_peft.app.rank_setup import download_base_once, join_ranks
from dist_peft.app.resolved_config import (
    configure_inference,
    configure_model_directory,
    find_solved_base,
    resolve_config,
)
from dist_peft.app.resuming import check_trained_tokenizer
from dist_peft.app.tasks import refuse_separate_tasks
from dist_peft.core.config.io import load_run_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_files
from dist_peft.core.world import World
from dist_peft.data.chat_template import ChatTemplate, Messages, RenderError
from dist_peft.data.tokenizer_digest import compute_tokenizer_digest
from dist_peft.export.stopping import read_stop_tokens
from dist_peft.model.generation import (
    Sampling,
    encode_plain_prompt,
    generate_tokens,
    load_plain_model,
)
from dist_peft.model.hub import Tokenizer, load_tokenizer, read_json_object
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.optimizers import make_optimizer_factory

__all__ = ["ChatModel", "choose_template", "open_model_directory", "open_run"]

log = logging.getLogger("dist_peft")


@dataclass(frozen=True)
class ChatModel:
    """A model with its tokenizer, template and end tokens.

    Attributes:
        model: of ``transformers``; sharded on several ranks.
        template: chat template; None: prompts are continued as they are.
        choice: a sentence on that, with the option that changes it.
        stop_ids: tokens that end an answer.
        disable: switches the adapter off inside; None: there is none that can be switched off.
    """

    model: Any
    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    device: torch.device
    world: World
    disable: Callable[[], Any] | None
    choice: str = ""

    def encode_messages(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation up to the answer.

        Without a template the last message alone is the prompt.

        Raises:
            UserError: the template refuses it.
        """
        if self.template is None:
            return encode_plain_prompt(self.tokenizer, messages[-1]["content"])
        try:
            text = self.template.render_text(messages, prompt=True)
        except RenderError as error:
            raise UserError(f"{self.template} refuses the conversation: {error}") from None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    def generate_answer(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        adapter: bool = True,
        show: Callable[[str], None] | None = None,
    ) -> list[int]:
        """Return the tokens of the answer, with the end token if there is one. Collective.

        Args:
            adapter: False: the base's answer.
            show: called with pieces of text; None on ranks that write nothing.

        Raises:
            UserError: there is no room for an answer, or no adapter that can be switched off.
        """

        def share(token: torch.Tensor) -> None:
            self.world.broadcast_tensor(token, 0)

        with self._select_adapter(adapter), inference_mode(self.model):
            return generate_tokens(
                self.model,
                self.tokenizer,
                prompt,
                sampling,
                stop_ids=self.stop_ids,
                device=self.device,
                share=share,
                show=show,
            )

    @contextmanager
    def _select_adapter(self, adapter: bool) -> Iterator[None]:
        if adapter:
            yield
            return
        if self.disable is None:
            raise UserError(
                "--adapter off and both need an adapter that can be switched off: give the --run "
                "of a method that leaves the base as it is, such as lora; a merged model has none"
            )
        with self.disable():
            yield

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def open_run(
    run_dir: Path,
    checkpoint: str,
    world: World,
    *,
    device: str,
    plain: bool | None,
    trust_remote_code: bool,
) -> ChatModel:
    """Load the base of a run with the adapter of a checkpoint. Collective.

    Args:
        checkpoint: ``last``, ``best`` or a step.
        device: ``auto``, ``cpu`` or ``cuda``.
        plain: use no chat template; None: use one if the run was trained on conversations, or if
            that is unknown.

    Raises:
        UserError: on every rank: no such run or checkpoint, a classifier, or another base.
    """
    refuse_special_files(run_dir)
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    refuse_separate_tasks(run_dir)
    stored = load_run_config(file, trust_remote_code=trust_remote_code)
    if stored.base.head == "classifier":
        raise UserError(f"{run_dir} is a run of a classifier, which generates no text")
    forward = configure_inference(stored, world.size, device)
    selected = join_ranks(forward, world)
    download_base_once(forward.base, world)
    with world.raise_together("prepare"):
        setup = build_model(resolve_config(forward, find_solved_base(forward, run_dir)))
    checkpoints = CheckpointManager(run_dir / "checkpoints", 1, world)
    path = checkpoints.find_checkpoint(checkpoint)
    with world.raise_together("compare the base with that of the checkpoint"):
        position = checkpoints.read_position(path)
        bases = read_checkpoint_bases([path], setup.skeleton.index, setup.config.base.quant)
        if position.base != setup.base_id:
            raise UserError(
                f"checkpoint {path} was made on another base or another base.quant than {file} "
                "names: restore config.yaml"
            )
        tokenizer_key, template_key = "tokenizer of base.path", "chat template of base.path"
        digest = compute_tokenizer_digest(setup.tokenizer)
        unchanged = {template_key: position.values.get(template_key)}
        check_trained_tokenizer(position, {tokenizer_key: digest, **unchanged})
        chats = read_chat_files(path)
    load_init_factors(setup, checkpoints, path)
    built = load_weights(setup, world, selected, bases)
    built.setup_optimizer(make_optimizer_factory(forward.train, selected))
    load_training_state(built, checkpoints, path, position.step)
    log.info("loaded %s", path)
    return _make_chat_model(built, world, chats, plain)


def _make_chat_model(
    built: LoadedModel, world: World, chats: ChatFiles, plain: bool | None
) -> ChatModel:
    setup, model = built.setup, built.model
    template, choice = choose_template(setup.tokenizer, chats, plain)
    can_disable = setup.config.adapter.kind != "none" and can_disable_adapter(model)
    return ChatModel(
        model,
        setup.tokenizer,
        template,
        _list_stop_ids(setup.directory, setup.tokenizer, chats.ends),
        built.engine.device,
        world,
        (lambda: disable_adapter(model)) if can_disable else None,
        choice,
    )


def open_model_directory(
    path: Path, world: World, *, device: str, plain: bool | None, trust_remote_code: bool
) -> ChatModel:
    """Load a merged or exported model; several ranks shard it. Collective.

    Args:
        path: a directory, or in one process also a GGUF file.
        plain: use no chat template; else the tokenizer's, if there is one.

    Raises:
        UserError: on every rank: it cannot be loaded.
    """
    if not path.exists():
        raise UserError(f"--model {path} does not exist")
    if path.is_dir() and not (path / "config.json").is_file():
        if len(files := sorted(path.glob("*.gguf"))) == 1:
            path = files[0]
        elif (path / "adapter_config.json").is_file():
            raise UserError(f"{path} is an adapter without its base; give the run with --run RUN")
        else:
            raise UserError(f"--model {path} has no config.json and is no directory of a model")
    if world.size == 1:
        return _open_plain_model(path, world, device, plain, trust_remote_code)
    if not path.is_dir():
        raise UserError(f"several ranks shard directories of safetensors files, and {path} is none")
    forward = configure_inference(_configure_directory(path, trust_remote_code), world.size, device)
    selected = join_ranks(forward, world)
    with world.raise_together("prepare"):
        setup = build_model(resolve_config(forward))
    return _make_chat_model(load_weights(setup, world, selected), world, ChatFiles(), plain)


def _configure_directory(path: Path, trust_remote_code: bool) -> RunConfig:
    described = read_json_object(path / "config.json")
    stated = str(described.get("dtype") or described.get("torch_dtype") or "float32")
    dtype = stated if stated in ("bfloat16", "float16") else "float32"
    return configure_model_directory(path, dtype, trust_remote_code=trust_remote_code)


def _open_plain_model(
    path: Path, world: World, device: str, plain: bool | None, trust_remote_code: bool
) -> ChatModel:
    refuse_special_files(path if path.is_dir() else path.parent)
    selected = world.select_device(device)
    directory = path if path.is_dir() else path.parent
    model = load_plain_model(path, selected, trust_remote_code=trust_remote_code)
    gguf = path.name if path.suffix == ".gguf" else None
    tokenizer = load_tokenizer(directory, trust_remote_code, gguf_file=gguf)
    template, choice = choose_template(tokenizer, ChatFiles(), plain)
    stops = _list_stop_ids(directory, tokenizer, ()) if gguf is None else ()
    return ChatModel(
        model,
        tokenizer,
        template,
        stops,
        selected,
        world,
        _make_peft_switch(model) if (directory / "adapter").is_dir() else None,
        choice,
    )


def _make_peft_switch(model: Any) -> Callable[[], Any]:
    @contextmanager
    def disable() -> Iterator[None]:
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()

    return disable


def choose_template(
    tokenizer: Tokenizer, chats: ChatFiles, plain: bool | None
) -> tuple[ChatTemplate | None, str]:
    """Return the template of the run, else the tokenizer's, and a sentence on the choice.

    The template is None where there is neither, with ``plain``, and, unless asked for, where the
    run saw no conversation: a template's marks are then nothing that it was trained on.
    """
    if plain:
        return None, "--plain: prompts are continued as they are"
    if chats.template is None and not tokenizer.chat_template:
        return None, "no chat template: prompts are continued as they are"
    template = ChatTemplate(tokenizer, chats.template)
    if plain is None and chats.conversations is False:
        return None, (
            "the run was trained on no conversations: prompts are continued as they are "
            f"(--template: through {template})"
        )
    return template, f"prompts go through {template} (--plain: continued as they are)"


def _list_stop_ids(
    directory: Path, tokenizer: Tokenizer, turn_end: Sequence[int]
) -> tuple[int, ...]:
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return tuple(dict.fromkeys((*read_stop_tokens(directory), *own, *turn_end)))
