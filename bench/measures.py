"""How thick the code is: lines, modules, flags, parameters. Prints a Markdown table.

python -m bench.measures [FOLDER ...]      several checkouts side by side; default: this one
"""

import ast
import re
import sys
from pathlib import Path

SCRIPTS = ["pretrain_mae", "finetune_biencoder", "mine_negatives", "encode", "evaluate"]
WIDEST, MOST_PARAMETERS = 100, 6


def functions_with_many_parameters(path: Path) -> int:
    """Functions of MOST_PARAMETERS or more, `self` and `cls` not counted."""
    found = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = {argument.arg for argument in arguments} - {"self", "cls"}
            found += len(names) >= MOST_PARAMETERS
    return found


def splatted_tuples(path: Path) -> int:
    """Calls with `*name` where `name` is a tuple that the same file builds as `name = a, b`."""
    text = path.read_text()
    tuples = set(re.findall(r"^\s+(\w+) = [\w.\"']+, [^=\n]+$", text, re.MULTILINE))
    return sum(name in tuples for name in re.findall(r"[(,] ?\*(\w+)[,)]", text))


def measure(folder: Path) -> dict[str, str]:
    modules = sorted((folder / "lib").glob("*.py"))
    scripts = [folder / f"{name}.py" for name in SCRIPTS]
    lengths = {path.name: len(path.read_text().splitlines()) for path in modules}
    longest = max(lengths, key=lengths.get)
    lines = [line for path in [*modules, *scripts] for line in path.read_text().splitlines()]
    arguments = (folder / "finetune_biencoder.py").read_text().split("class Args")[1]
    many_parameters = sum(map(functions_with_many_parameters, modules))
    flags = re.findall(r"^    \w+: .*= (?:arg|HfArg)\(", arguments, re.MULTILINE)
    sizes = [str(len(path.read_text().splitlines())) for path in scripts]
    return {
        "`lib/`, lines": f"{sum(lengths.values())}",
        "longest module": f"{lengths[longest]} ({longest})",
        "five scripts": ", ".join(sizes),
        "flags of finetune_biencoder.py": f"{len(flags)}",
        "functions with six or more parameters": f"{many_parameters}",
        "lines over 100 columns": f"{sum(len(line) > WIDEST for line in lines)}",
        "splatted tuples": f"{sum(map(splatted_tuples, [*modules, *scripts]))}",
    }


def main():
    folders = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1]]
    tables = [measure(folder) for folder in folders]
    print("| | " + " | ".join(folder.resolve().name for folder in folders) + " |")
    print("| --- |" + " --- |" * len(folders))
    for name in tables[0]:
        print(f"| {name} | " + " | ".join(table[name] for table in tables) + " |")


if __name__ == "__main__":
    main()
