"""The gallery of token mixers in docs/mixers.md: python -m visionzoo.benchmark.gallery [--write FILE].

Titles, mathematics, costs and papers are those of the docstrings, what a mixer takes is what it says itself; when to
use it stands here. A new mixer needs a line in `ABOUT`, and in its docstring, after the first sentence, a line of
mathematics that is indented and one with "Time: O(...); memory: O(...)."
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

import torch

from visionzoo.engine import run_tool
from visionzoo.engine.flags import compare_parser
from visionzoo.engine.reporting import write_between
from visionzoo.layers.mixers import MIXERS, build_mixer

BEGIN = "<!-- gallery of mixers: written by python -m visionzoo.benchmark.gallery, from the classes -->"
END = "<!-- end of the gallery of mixers -->"
RECIPE = Path(__file__).parents[2] / "configs/classification/cifar10_mixers.yaml"
FORMULA = re.compile(  # the line of mathematics, time and memory
    r"\n\n    (\S.*)\n\nTime: (O\(.*?\)[^.;]*); memory: (O\(.*?\)[^.;]*)\.\n", re.DOTALL
)
PAPER = re.compile(r"(?:arXiv:)?\b(\d{4}\.\d{5})\b")

ABOUT = {  # when to use it
    "adaptive_fourier": "global context for light networks on maps whose side changes; the MLP costs the same at each.",
    "aggregated": "pyramids that need near detail and far context in each block, and images larger than in training.",
    "channel": "large maps: linear in tokens and global; beside a mixer of places, as it compares channels only.",
    "clamped_linear": "linear attention that must train stably, with windows in other blocks.",
    "cross_window": "pyramids: a whole row and column of stripes is seen after one block.",
    "data_dependent_conv": "a kernel as long as the map that depends on the image; maps of about the size trained for.",
    "decoupled_fc": "the lightest mixer along whole rows and columns, for phones.",
    "dual_attention": "tasks about relations between things, on small maps: relations of all pairs are held.",
    "dynamic_local": "restoration and other dense tasks where the kernel should follow the content.",
    "embedding_free": "segmentation decoders: few parameters, and `isr` makes inference cheaper without training.",
    "expert_choice": "many heads at the price of few, where most tokens say little.",
    "factorized": "pyramids with large maps: reach grows with r, cost does not.",
    "flow": "linear attention that must not become uniform; any set of tokens.",
    "focused_linear": "pyramids with large maps, in softmax's place: sharp weights, and no low rank.",
    "forward_cross": "in FcaFormer, whose blocks hand cross tokens on; elsewhere attention with a bias for offsets.",
    "fourier": "a baseline without parameters: how much of the accuracy is due to mixing at all.",
    "full": "the default up to about 1,000 tokens; `kv_heads` where keys and values are too much memory.",
    "gated_positional": "small data sets: heads begin as a convolution and unlearn it where it does not serve.",
    "glu": "a control without any mixing of tokens.",
    "gmm": "small data sets: a prior for near tokens at a few numbers for each head.",
    "halo": "in place of the larger convolutions of a ResNet.",
    "hashed_linear": "where multiplications cost energy: sums of values take their place.",
    "hilo": "fast plain pyramids: no positions, no shifts, two small attentions.",
    "injective_linear": "linear attention near softmax's accuracy at any number of tokens; no denominator to fail.",
    "kmeans": "long sequences whose tokens form groups; √N clusters are cheapest.",
    "kolmogorov_arnold": "research into what softmax does; maps of one size.",
    "large_kernel_ffn": "plain convolutions in the shape of attention: fast, any size, exported without effort.",
    "levit": "low latency on small maps: batch norms are folded into the layers.",
    "light_conv": "near detail at a few taps for each head; `dynamic` where the kernel should follow the content.",
    "linear": "more than a few thousand tokens; `elu` first, features and denominators of the literature are options.",
    "mixture_of_heads": "to study what heads are for; heads not taken are computed, too.",
    "moving_average": "sequences with a strong order; slow for its accuracy on maps.",
    "multi_pool": "as cheap as pooling with a global part.",
    "neighborhood": "dense tasks on large maps: sliding windows with a kernel of their own; dilate every other block.",
    "nystrom": "softmax's weights of models that are trained, at more tokens; the pseudo-inverse iterates.",
    "pattern": "fixed sparse attention: two parts, such as row and column, connect all tokens in two blocks.",
    "pool": "the cheapest mixer that works; the baseline for all others in a pyramid.",
    "routed": "large maps where far things matter and most of the map does not; kernels of its own on GPUs.",
    "score": "to compare what has been put in softmax's place; sigmoid where sums over keys must not couple tokens.",
    "sea": "to study which weights matter, or to take over a trained model's attention; all products are computed.",
    "single_head": "speed on small devices, late stages.",
    "sparsifiner": "to study which connections matter; saves no time, as all products are computed.",
    "spatial_reduction": "pyramids: the simplest way to global attention on large maps; `pool_size` makes it linear.",
    "spectral_gate": "early blocks of plain networks: global, N·log N, no attention.",
    "subspace": "white-box transformers; a third of the projection's parameters.",
    "super_token": "early stages of pyramids: global attention between s² times fewer tokens.",
    "taylor_shift": "many tokens and narrow heads: exact, and linear above D² + D + 1 tokens.",
    "window": "the safe choice in pyramids; shift every other block, or put `channel` between.",
}


def gallery() -> str:
    """Return a section for each mixer, in Markdown."""
    forms: dict[str, list[str]] = {}
    for spec in compare_parser().read_config(RECIPE)["mixers"]:
        options = ", ".join(f"{k}={v!r}" for k, v in spec.items() if k not in ("type", "label"))
        if options:
            forms.setdefault(spec["type"], []).append(f"`{spec['label']}`: `{options}`")
    return "\n\n".join(_entry(name, forms.get(name, [])) for name in sorted(MIXERS))


def mathematics(cls: type) -> tuple[str, str, str]:
    """Return the line of mathematics of a mixer's docstring, and what it costs in time and memory.

    Raises:
        ValueError: if the docstring has none.
    """
    found = FORMULA.search((inspect.getdoc(cls) or "").split("\nArgs:")[0])
    if found is None:
        raise ValueError(
            f"{cls.__name__}: expected a docstring with an indented line of mathematics after its first sentence, and "
            f"'Time: O(...); memory: O(...).' after that"
        )
    formula, time, memory = (" ".join(part.split()) for part in found.groups())
    return formula, time, memory


def _entry(name: str, forms: list[str]) -> str:
    cls = MIXERS[name]
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    doc = inspect.getdoc(cls) or ""
    formula, *costs = mathematics(cls)
    with torch.device("meta"):
        mixer = build_mixer(name, 64, 2)
    assert mixer is not None
    own = dict.fromkeys([*PAPER.findall(module.split("\n\n")[0]), *PAPER.findall(doc.split("\n\n")[0])])
    others = [paper for paper in dict.fromkeys(PAPER.findall(doc)) if paper not in own]
    summary = " ".join(doc.split("\n\n")[0].split())
    takes = [
        "any height and width",
        "class tokens take part" if mixer.takes_prefix_tokens else "class tokens pass by",
        "reducers may stand before it" if mixer.takes_dropped_tokens else "no dropped tokens",
    ]
    lines = [f"### `{name}`", _linked(summary), f"    {formula}"]
    facts = [f"- Time: {costs[0]}", f"- Memory: {costs[1]}"]
    facts += [f"- Paper: {', '.join(map(_link, own))}"] if own else []
    facts += [f"- Papers of its forms: {', '.join(map(_link, others))}"] if others else []
    facts += [f"- Takes: {'; '.join(takes)}", f"- When: {ABOUT[name]}"]
    facts += [f"- In the comparison as {'; '.join(forms)}"] if forms else []
    return "\n\n".join([*lines, "\n".join(facts)])


def _link(paper: str) -> str:
    return f"[arXiv:{paper}](https://arxiv.org/abs/{paper})"


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", lambda match: _link(match[1]), text)


def main() -> None:
    """Parse, print or write."""
    parser = argparse.ArgumentParser(description="The gallery of token mixers in Markdown, from the classes.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it into this Markdown file, between its marks")
    args = parser.parse_args()
    if args.write:
        write_between(args.write, BEGIN, END, gallery())
    else:
        print(gallery())


if __name__ == "__main__":
    run_tool(main)
