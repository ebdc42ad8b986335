"""The command line: what there is to do, and errors that say what is wrong. Everything heavy is imported by the command."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyrlhf import __version__

STAGES = ("generate", "pretrain", "sft", "reward", "ppo")
OK, FAILED, MISUSED, WAITING, STOPPED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 3 waiting for people's rankings."""
    args = argparse.Namespace(debug=False)
    try:
        parser = _parser()
        words = _dotted_as_settings(_without_launcher_words(sys.argv[1:] if argv is None else argv))
        args, rest = parser.parse_known_args(words)
        if rest and not args.settings:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return int(args.command(args, _overrides(rest, parser)))
    except KeyboardInterrupt:
        return _tell("stopped; the same command goes on from the last checkpoint", STOPPED)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the reader has gone; flushing at exit must not fail)
        return OK
    except Exception as error:  # whatever fails, the user gets one message
        if args.debug:
            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    name = type(error).__name__
    if name == "RankingsNeeded":
        return _tell(str(error), WAITING)
    code = MISUSED if name == "SettingsError" else FAILED
    if code == MISUSED and os.environ.get("RANK", "0") != "0":
        return code  # every rank reads the same settings; one message is enough
    said = (
        str(error)
        if str(error) and isinstance(error, (ValueError, RuntimeError, OSError, ImportError))
        else f"{name}: {error}"
    )
    log = getattr(error, "log", None)
    note = (
        f"\nThe whole story is in {log}; --debug prints it."
        if log is not None and code == FAILED and name != "RunError"
        else ""
    )
    return _tell(f"error: {said}{note}", code)


def _tell(text: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(text if rank == "0" else f"rank {rank}: {text}", file=sys.stderr)
    return code


# ---- words --------------------------------------------------------------------------------------------------------


def _without_launcher_words(words: Sequence[str]) -> list[str]:
    """deepspeed and torch.distributed put ``--local_rank=N`` (or ``--local-rank N``) somewhere; RANK says the same."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("--local_rank", "--local-rank"):
            skip = True
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


def _dotted_as_settings(words: Sequence[str]) -> list[str]:
    """``ppo.lr=1`` and ``--ppo.lr 1`` as ``--ppo.lr=1``: no command has an option with a dot, and none takes it for RECIPE."""
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.removeprefix("--").partition("=")
        dotted = "." in key and key.replace(".", "").replace("_", "").isalnum()
        if dotted and word.startswith("--") and not equals and rest and not rest[0].startswith("--"):
            kept.append(f"{word}={rest.pop(0)}")
        elif dotted and equals and not word.startswith("--") and not os.path.exists(word):
            kept.append(f"--{word}")
        else:
            kept.append(word)
    return kept


def _overrides(rest: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """What a command has not taken for itself, as ``key=value``: ``seed=3``, ``--seed=3`` and ``--seed 3``."""
    found: list[str] = []
    words = list(rest)
    while words:
        word = words.pop(0)
        key = word.removeprefix("--")
        if "=" not in key and word.startswith("--") and words and not words[0].startswith("--"):
            key = f"{key}={words.pop(0)}"
        if "=" not in key and not word.startswith("--"):
            parser.error(f"unrecognized argument: {word} (a setting is written key=value)")
        found.append(key)
    return found


# ---- commands -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyrlhf",
        description="Train language models from human feedback: pretrain, SFT, reward model, PPO and PPO-ptx.",
        epilog="`pyrlhf COMMAND --help` tells the rest; `pyrlhf demo` needs no data, no network and no GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pyrlhf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = _command(
        commands, "run", _run, "run a recipe's stages, skipping finished ones", settings=True, add_help=False
    )
    _recipe_options(run, None)
    run.add_argument("--stage", choices=STAGES, help="run this stage alone, on what the earlier ones have left")
    for stage in STAGES[1:]:
        one = _command(commands, stage, _run, f"the same as `run --stage {stage}`", settings=True, add_help=False)
        _recipe_options(one, stage)
        one.set_defaults(stage=stage)
    _generate_options(_command(commands, "generate", _generate, "sample answers from a model"))
    _chat_options(_command(commands, "chat", _chat, "talk to a model"))
    _eval_options(_command(commands, "eval", _none, "win rate, reward-model accuracy, perplexity"))
    demo = _command(commands, "demo", _demo, "the whole pipeline on an embedded task, a few minutes on a laptop")
    demo.add_argument(
        "--quick", action="store_true", help="smaller and shorter: shows that everything works, not how well"
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the results (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0)
    _command(commands, "doctor", _doctor, "what this installation can do, and how to mend what is wrong")
    return parser


def _command(commands: Any, name: str, function: Any, help: str, *, settings: bool = False, **kw: Any) -> Any:
    parser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False, **kw
    )
    parser.add_argument("--debug", action="store_true", help="leave all output on the terminal and print tracebacks")
    parser.set_defaults(command=function, settings=settings)
    return parser


class _HelpWithSettings(argparse.Action):
    """``--help`` of a command that takes a recipe: its options, then every key of the recipe (or of one stage)."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        from pyrlhf.terminal import quiet

        with quiet(Path(os.devnull)):
            from pyrlhf.recipe import Recipe
            from pyrlhf.settings import describe

            text = describe(Recipe, self.const)
        more = "" if self.const is None else "\n\nAll keys of a recipe: pyrlhf run --help"
        print(f"{parser.format_help()}\nkeys of a recipe:\n{text}{more}")
        parser.exit()


def _recipe_options(parser: argparse.ArgumentParser, section: str | None) -> None:
    parser.usage = f"{parser.prog} RECIPE [options] [KEY=VALUE ...]"
    parser.add_argument(
        "-h", "--help", action=_HelpWithSettings, nargs=0, const=section, help="show this help and exit"
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", type=Path, help="YAML file; KEY=VALUE (or --KEY VALUE) overrides it"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what the run has made before and begin anew")


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of a language model")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given again")
    parser.add_argument(
        "--prompts", type=Path, help="file of prompts (JSONL with `prompt` or `messages`, or any other data)"
    )
    parser.add_argument("--output", type=Path, help="JSONL file to write (default: the terminal)")
    parser.add_argument("-n", type=int, default=1, help="answers to each prompt (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first prompts")
    parser.add_argument("--fresh", action="store_true", help="begin anew where an interrupted run could go on")
    _sampling_options(parser)
    _device_options(parser)


def _chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of a language model")
    parser.add_argument("--system", default="", help="text of a first turn by `system`")
    _sampling_options(parser)
    parser.set_defaults(max_new_tokens=512)
    _device_options(parser)


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="longest answer in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="0 is off (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off (default: %(default)s)")
    parser.add_argument("--min-p", type=float, default=0.0, help="0 is off (default: %(default)s)")
    parser.add_argument(
        "--min-new-tokens", type=int, default=0, help="shortest answer in tokens (default: %(default)s)"
    )
    parser.add_argument("--stop", action="append", default=[], help="a text that ends an answer; may be given again")
    parser.add_argument("--seed", type=int, default=0)


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts handled together (default: %(default)s)")


def _eval_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    win = _command(kinds, "winrate", _eval, "how often the first one's answers score above the second one's")
    win.add_argument("a", type=Path, help="samples (JSONL with prompt and response) or folder of a language model")
    win.add_argument("b", type=Path, help="the other one")
    scorer = win.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", type=Path, help="folder of the reward model that scores")
    scorer.add_argument("--labeller", help="package.module:function (prompt, responses) -> scores")
    win.add_argument("--prompts", type=Path, help="prompts for models (samples bring their own)")
    win.add_argument("--limit", type=int, help="use only the first prompts")
    _sampling_options(win)
    accuracy = _command(
        kinds, "reward-accuracy", _eval, "pairs of a ranking that a reward model orders alike", settings=True
    )
    accuracy.add_argument("model", type=Path, help="folder of a reward model")
    text = _command(kinds, "perplexity", _eval, "perplexity of a language model on text", settings=True)
    text.add_argument("model", type=Path, help="folder of a language model")
    text.add_argument(
        "--context",
        type=int,
        default=512,
        help="tokens of a block, at most the model's own context (default: %(default)s)",
    )
    for kind, name in ((win, "winrate"), (accuracy, "reward-accuracy"), (text, "perplexity")):
        _device_options(kind)
        kind.add_argument("--json", action="store_true", help="print the numbers as JSON")
        kind.set_defaults(kind=name)
        if kind is not win:
            kind.usage = f"{kind.prog} MODEL DATA [options] [KEY=VALUE ...]"
            kind.add_argument(
                "data", type=Path, help="file; KEY=VALUE says how to read it (format=text, limit=100, ...)"
            )


def _none(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    raise AssertionError("`eval` always has a sub-command")


def _run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from pyrlhf.terminal import quiet

    with quiet(None if args.debug else Path(os.devnull)):  # imports are noisy, and the log's folder is not known yet
        from pyrlhf.recipe import load_recipe, run_recipe

        recipe = load_recipe(args.recipe, overrides)
    _logged(Path(recipe.output) / "log.txt", args.debug, lambda: run_recipe(recipe, args.stage, fresh=args.fresh))
    return OK


def _demo(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    def run() -> None:
        from pyrlhf import demo

        demo.main(quick=args.quick, device=args.device, output=args.output, seed=args.seed)

    _logged(args.output.with_name(f"{args.output.name}.log"), args.debug, run)
    return OK


def _logged(log: Path, debug: bool, work: Callable[[], object]) -> None:
    """Do ``work`` with a quiet terminal; a failure goes into the log in full, and the error knows where that is."""
    from pyrlhf.terminal import log as logger
    from pyrlhf.terminal import quiet

    with quiet(None if debug else log):
        try:
            work()
        except Exception as error:
            logger.exception("the run failed")
            error.log = log  # type: ignore[attr-defined]
            raise


def _generate(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from pyrlhf.terminal import out, quiet

    with quiet(None if args.debug else Path(os.devnull)):
        from pyrlhf.commands import generate

        for line in generate(args):
            out().write(line)
            out().flush()
    return OK


def _chat(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from pyrlhf.terminal import out, quiet

    with quiet(None if args.debug else Path(os.devnull)):
        from pyrlhf.chat import HELP, converse
        from pyrlhf.commands import chat

        opened = chat(args)
        out().write(f"{HELP}\n")
        converse(opened, sys.stdin, out())
    return OK


def _eval(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from pyrlhf.terminal import quiet

    with quiet(None if args.debug else Path(os.devnull)):
        from pyrlhf import commands

        numbers = commands.evaluate(args, overrides)
    if args.json:
        print(json.dumps(numbers))
    else:
        print("\n".join(commands.lines(numbers)))
    return OK


def _doctor(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from pyrlhf.doctor import main as doctor

    return doctor()
