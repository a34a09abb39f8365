"""Scores a GPT-2 on HellaSwag: which of four endings does the model find most likely?

    python hellaswag.py -m gpt2                          # OpenAI's GPT-2 124M, from the Hub
    python hellaswag.py -m log/step_19073 -d cuda        # a checkpoint (or log/: its newest one)
    python hellaswag.py -m gpt2 --style=harness --limit=1000 --out=results.jsonl
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m gpt2-xl    # shared by eight GPUs

Prints one line for each style that support/hellaswag_eval.py describes. The data is downloaded to
hellaswag/hellaswag_val.jsonl if it is not there.
"""

import argparse
import json
import sys

from support import hellaswag_eval, huggingface, quantize
from support.cli import Parser
from support.distributed import initialize, leave_group, naming_lost_ranks
from support.errors import SettingError, run_main

# The last two are for programs that import them as in build-nanogpt.
from support.hellaswag_eval import STYLES, Question, iterate_examples, render_example  # noqa: F401
from support.launch import print0, read_launch
from train_gpt2 import GPT


def parse(arguments: list[str]) -> argparse.Namespace:
    """The settings of a command line. Raises SettingError if one of them is not valid."""
    parser = Parser(description="Scores a GPT-2 on HellaSwag.", allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model", default="gpt2", help="a Hub name, a checkpoint, a log directory [gpt2]")
    add("-d", "--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    add("--int8", action="store_true", help="the model's matrices in 8 bits")
    add("--style", default="all", choices=("all", *STYLES), help="the way of scoring [all]")
    add("--limit", type=int, default=0, help="only the first examples [0: all]")
    add("--data", help="a .jsonl of examples [hellaswag/hellaswag_val.jsonl, else downloaded]")
    add("--out", help="a .jsonl to write, one line for each example and style")
    options = parser.parse_args(arguments)
    if options.limit < 0:
        raise SettingError(f"limit={options.limit}: must be at least 0 examples")
    return options


def format_results(style: str, examples: list[dict], questions: list[Question], losses) -> str:
    """A line of JSON for each example: its losses, and the endings chosen."""
    lines, chosen = [], zip(*hellaswag_eval.predict(losses, questions))
    for i, (example, question, (best, best_norm)) in enumerate(zip(examples, questions, chosen)):
        line = {
            "style": style,
            "example": example.get("ind", i),
            "label": question.label,
            "losses": losses[i].tolist(),
            "lengths": question.lengths,
            "chosen": int(best),
            "chosen_norm": int(best_norm),
        }
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def write_out(path: str, text: str, mode: str = "a") -> None:
    """Appends to a file, or replaces it (mode "w"). Raises SettingError if that fails."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SettingError(f"out={path!r}: {error.strerror}; choose another file") from None


def main() -> int:
    options = parse(sys.argv[1:])
    runtime = initialize(options.device, options.dtype, read_launch())
    path = hellaswag_eval.find_file(data=options.data)
    examples = hellaswag_eval.read_examples(path, options.limit)
    name, directory, _ = huggingface.find_model(options.model)
    model = GPT.from_pretrained(directory)
    parameters = model.num_parameters()
    placement = quantize.prepare_for_inference(model, runtime, options.int8)
    print0(f"{name}: {parameters:,} parameters, {placement}")
    writes = options.out is not None and runtime.master_process
    if writes:
        write_out(options.out, "", mode="w")  # fails now, and not after the first style
    for style in STYLES if options.style == "all" else (options.style,):
        questions = [hellaswag_eval.make_question(example, style) for example in examples]
        title = style if runtime.master_process else ""
        with naming_lost_ranks(remedy="run the same command again"):
            losses = hellaswag_eval.ending_losses(model, questions, runtime, title=title)
        if writes:
            write_out(options.out, format_results(style, examples, questions, losses))
        print0(f"{style}: {hellaswag_eval.score(losses, questions)}")
    leave_group()
    return 0


if __name__ == "__main__":
    run_main(main)
