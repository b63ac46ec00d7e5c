"""Has the bottleneck learned? The first and the last probe of a pre-training run.

Reads   OUT/log.jsonl of pretrain_mae.py --probe_every

    python -m recipes.probe_report --output_dir OUT
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lib.arguments import arg, parse_args
from lib.files import UserError, lines
from lib.launch import run


@dataclass(kw_only=True)
class Args:
    output_dir: str = arg(help="folder of a run of pretrain_mae.py")


MEANING = {
    "probe_rebuild": "share of a text's tokens that the decoder finds from the vector alone",
    "probe_cosine": "mean cosine of different texts; near 1, all vectors are alike",
    "probe_recall@100": "share of the positives among the first 100 of a sample",
}
# The decoder that always names the commonest token finds about 0.05; twice that needs the vector.
LEARNED = 0.1


def verdict(first: dict, last: dict) -> str:
    if "probe_rebuild" not in last:
        return "this objective has no decoder that could rebuild a text: compare rankings instead"
    before, after = first["probe_rebuild"], last["probe_rebuild"]
    if after < LEARNED:
        found = f"the decoder finds {after:.1%} of the tokens from the vector alone"
        return f"the bottleneck has not learned: {found} — train longer"
    if after <= before:
        return f"the bottleneck carried {before:.1%} of the tokens before, and {after:.1%} now"
    return f"the bottleneck has learned: {before:.1%} of the tokens before, {after:.1%} now"


def main():
    args = parse_args(Args)
    path = Path(args.output_dir) / "log.jsonl"
    rows = [json.loads(line) for _, line in lines(path)]
    probes = [row for row in rows if "probe_cosine" in row]
    if len(probes) < 2:
        raise UserError(f"{path}: fewer than two probes — give pretrain_mae.py --probe_every")
    first, last = probes[0], probes[-1]
    print(f"\n{'':<18}{'step ' + str(first['step']):>12}{'step ' + str(last['step']):>12}")
    for name, meaning in MEANING.items():
        if name in last:
            print(f"{name:<18}{first[name]:>12.4f}{last[name]:>12.4f}   {meaning}")
    print(verdict(first, last))


if __name__ == "__main__":
    run(main)
