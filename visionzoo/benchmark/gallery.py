# ruff: noqa: RUF001  mathematics is written as such
"""The gallery of token mixers in docs/mixers.md: python -m visionzoo.benchmark.gallery [--write FILE].

Titles, papers and costs are those of the docstrings, what a mixer takes is what it says itself; its line of mathematics
and when to use it stand here. A new mixer needs a line in `ABOUT`.
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
COST = re.compile(r"O\((?:[^()]|\([^()]*\))*\)")
PAPER = re.compile(r"(?:arXiv:)?\b(\d{4}\.\d{5})\b")

ABOUT = {  # a line of mathematics; when to use it
    "adaptive_fourier": (
        "y = x + F⁻¹(shrink(MLP(F x)) ⊙ F x)",
        "global context for light networks on maps whose side changes; the MLP costs the same at every size.",
    ),
    "aggregated": (
        "yᵢ = [softmaxⱼ(τ·cos(qᵢ, kⱼ) + bᵢⱼ) + qᵢ·Tⱼ over i's k × k window, over M cells] · v",
        "pyramids that need near detail and far context in each block, and larger images than they were trained on.",
    ),
    "channel": (
        "y = (softmax(D^-½ kᵀ v) qᵀ)ᵀ, for each head",
        "large maps: linear in tokens and global; beside a mixer of places, as it compares channels only.",
    ),
    "clamped_linear": (
        "yᵢ = s·φ(qᵢ)·(Σⱼ φ(kⱼ) vⱼᵀ) / max(φ(qᵢ)·Σⱼ φ(kⱼ), d), φ = relu",
        "linear attention that must train stably, with windows in other blocks.",
    ),
    "cross_window": (
        "yᵢ = Σ over i's stripe of softmaxⱼ(qᵢ·kⱼ / √D) vⱼ, half of the heads upright, half across, + conv(v)",
        "pyramids: a whole row and column of stripes is seen after one block.",
    ),
    "data_dependent_conv": (
        "y = g₂ ⊙ (h(x) ∗ (g₁ ⊙ x)), ∗ around the whole sequence",
        "a kernel as long as the map that depends on the image, in N·log N; maps of about the size trained for.",
    ),
    "decoupled_fc": (
        "y = BN(conv(BN(conv(x)))), depthwise, with 1 × k, then k × 1 places",
        "the lightest mixer along whole rows and columns, for phones.",
    ),
    "dual_attention": (
        "yᵢ = [Σⱼ αᵢⱼ vⱼ, Σⱼ αᵢⱼ (W rᵢⱼ + sⱼ)], rᵢⱼ relations of i and j",
        "tasks about relations between things, on small maps: relations of all pairs are held.",
    ),
    "dynamic_local": (
        "yₚ = W₁ Σₒ wₚₒ (W₀ x)ₚ₊ₒ, w from a small network at p",
        "restoration and other dense tasks where the kernel should follow the content.",
    ),
    "embedding_free": (
        "yᵢ = Σⱼ softmaxⱼ(xᵢ·kⱼ / √D) kⱼ, k the means of r × r patches after one layer",
        "segmentation decoders: few parameters, and `isr` makes inference cheaper without training.",
    ),
    "expert_choice": (
        "y = Σ_g Sᵍ(rᵍ ⊙ softmax(Qᵍ Kᵍᵀ / √D) Vᵍ) Oᵍ, head g chooses its k tokens by rᵍ",
        "many heads at the price of few, where most tokens say little.",
    ),
    "factorized": (
        "y = [attention to windows at steps r and 1, attention to the r-reduced map]",
        "pyramids with large maps: reach grows with r, cost does not.",
    ),
    "flow": (
        "yᵢ = σ(Îᵢ) · σ(qᵢ)·(Σⱼ σ(kⱼ) (N·softmax(Ô)ⱼ vⱼ)ᵀ) / Iᵢ, I incoming flow, Î and Ô conserved flows",
        "linear attention that must not become uniform; any set of tokens.",
    ),
    "focused_linear": (
        "yᵢ = φ(qᵢ)·(Σⱼ φ(kⱼ) vⱼᵀ) / φ(qᵢ)·Σⱼ φ(kⱼ) + dwconv(v), φ(x) = |x|·relu(x)ᵖ / |relu(x)ᵖ|",
        "a drop-in for softmax in pyramids with large maps: sharp weights, and the convolution mends the low rank.",
    ),
    "forward_cross": (
        "yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D + b(j - i)) vⱼ over tokens and cross tokens",
        "in FcaFormer, whose blocks hand cross tokens on; elsewhere attention with a bias for offsets.",
    ),
    "fourier": (
        "y = Re(F_tokens · x · F_channels)",
        "a baseline without parameters: how much of the accuracy is due to mixing at all.",
    ),
    "full": (
        "yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D) vⱼ",
        "the default up to about 1,000 tokens; `kv_heads` where keys and values are too much memory.",
    ),
    "gated_positional": (
        "yᵢ = Σⱼ [(1 - σ(λ)) softmaxⱼ(qᵢ·kⱼ) + σ(λ) softmaxⱼ(w·r(j - i))] vⱼ",
        "small data sets: heads begin as a convolution and unlearn it where it does not serve.",
    ),
    "glu": (
        "yᵢ = W₃(act(W₁ xᵢ) ⊙ W₂ xᵢ)",
        "a control without any mixing of tokens.",
    ),
    "gmm": (
        "yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D · Σ_k a_k exp(-d(i, j)² / 2σ_k²)) vⱼ",
        "small data sets: a prior for near tokens at a few numbers for each head.",
    ),
    "halo": (
        "yᵢ = Σ over i's block and its rim of softmaxⱼ(qᵢ·kⱼ / √D + qᵢ·r(j - i)) vⱼ",
        "in place of 3 × 3 convolutions of a ResNet.",
    ),
    "hashed_linear": (
        "yᵢ = (hᵢ·(Σⱼ hⱼ vⱼᵀ) + c·vᵢ) / (hᵢ·Σⱼ hⱼ + N·c), h binary codes",
        "where multiplications cost energy: sums of values take their place.",
    ),
    "hilo": (
        "y = [attention inside w × w windows, attention to the windows' means]",
        "fast plain pyramids: no positions, no shifts, two small attentions.",
    ),
    "injective_linear": (
        "yᵢ = v̄ + s/N·φ(qᵢ)·Σⱼ (φ(kⱼ) - mean φ(k)) vⱼᵀ + conv(v)",
        "linear attention near softmax's accuracy at any number of tokens; no denominator to fail.",
    ),
    "kmeans": (
        "yᵢ = mean over the clusters with i of Σⱼ softmaxⱼ(qᵢ·kⱼ / √D) vⱼ over their keys",
        "long sequences whose tokens form groups; √N clusters are cheapest.",
    ),
    "kolmogorov_arnold": (
        "yᵢ = Σⱼ (W·Φ(sᵢ))ⱼ vⱼ, Φ Fourier series of the row of scores sᵢ",
        "research into what softmax does; maps of one size.",
    ),
    "large_kernel_ffn": (
        "y = dwconvₖ(act(dwconvₖ(BN(W x))))",
        "plain convolutions in the shape of attention: fast, any size, exported without effort.",
    ),
    "levit": (
        "yᵢ = BN(W·act(Σⱼ softmaxⱼ(qᵢ·kⱼ / √D + b(|j - i|)) vⱼ))",
        "low latency on small maps: batch norms are folded into the layers.",
    ),
    "light_conv": (
        "yₚ = W₂ Σₒ softmaxₒ(w)ₒ uₚ₊ₒ, u = GLU(W₁ x), w learned or W uₚ",
        "near detail at a few taps for each head; `dynamic` where the kernel should follow the content.",
    ),
    "linear": (
        "yᵢ = φ(qᵢ)·(Σⱼ φ(kⱼ) vⱼᵀ) / φ(qᵢ)·Σⱼ φ(kⱼ)",
        "more than a few thousand tokens; `elu` first, features and denominators of the literature are options.",
    ),
    "mixture_of_heads": (
        "yᵢ = Σ_g gᵢ_g headᵍ(x)ᵢ, g the router's choice for token i",
        "to study what heads are for; heads not taken are computed, too.",
    ),
    "moving_average": (
        "y = gate(x, f(q kᵀ + b) v), q and k from damped moving averages of x",
        "sequences with a strong order; slow for its accuracy on maps.",
    ),
    "multi_pool": (
        "yᵢ = W((g + sᵢ) ⊙ oᵢ + lᵢ), g global, s of the segment, l of the neighbourhood",
        "as cheap as pooling with a global part.",
    ),
    "neighborhood": (
        "yᵢ = Σ over the k × k nearest of softmaxⱼ(qᵢ·kⱼ / √D + b(j - i)) vⱼ",
        "dense tasks on large maps: sliding windows with a kernel of their own; dilate every other block.",
    ),
    "nystrom": (
        "y = softmax(q k̃ᵀ)·softmax(q̃ k̃ᵀ)⁺·softmax(q̃ kᵀ)·v, q̃ and k̃ means of stretches",
        "softmax's weights of models that are trained, at more tokens; the pseudo-inverse iterates.",
    ),
    "pattern": (
        "yᵢ = Σ over j ∈ P(i) of softmaxⱼ(qᵢ·kⱼ / √D) vⱼ",
        "fixed sparse attention: two parts, such as row and column, connect all tokens in two blocks.",
    ),
    "pool": (
        "yᵢ = mean over the k × k nearest of x - xᵢ",
        "the cheapest mixer that works; the baseline for all others in a pyramid.",
    ),
    "routed": (
        "yᵢ = Σ over the k regions that i's region likes of softmaxⱼ(qᵢ·kⱼ / √C) vⱼ + dwconv(v)",
        "large maps where far things matter and most of the map does not; kernels of its own on GPUs.",
    ),
    "score": (
        "yᵢ = Σⱼ normaliser(score(qᵢ, ·))ⱼ vⱼ",
        "to compare softmax with what has been put in its place; sigmoid where sums over keys must not couple tokens.",
    ),
    "sea": (
        "yᵢ = σ(bᵢ)·σ(aᵢ)·Σ over j ∈ top(estimated pᵢ) of softmaxⱼ(qᵢ·kⱼ / √D) vⱼ + (1 - σ(bᵢ))·Σⱼ p̄ⱼ vⱼ",
        "to study which weights matter, or to take over a trained model's attention; all products are computed.",
    ),
    "single_head": (
        "y = W·[attention(x₁), x₂], x₁ a fifth of the channels",
        "speed on small devices, late stages.",
    ),
    "sparsifiner": (
        "yᵢ = Σ over j ∈ top(predicted aᵢ) of softmaxⱼ(qᵢ·kⱼ / √D) vⱼ",
        "to study which connections matter; saves no time, as all products are computed.",
    ),
    "spatial_reduction": (
        "yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D) vⱼ over one key for each r × r patch",
        "pyramids: the simplest way to global attention on large maps; `pool_size` makes it linear.",
    ),
    "spectral_gate": (
        "y = F⁻¹(W ⊙ F x)",
        "early blocks of plain networks: global, N·log N, no attention.",
    ),
    "subspace": (
        "y = W Σ_g Zᵍ softmax(Zᵍᵀ Zᵍ / √D), Zᵍ = Uᵍᵀ x",
        "white-box transformers; a third of the projection's parameters.",
    ),
    "super_token": (
        "y = Q·attention(Qᵀ x / Qᵀ 1), Q the memberships of tokens in super tokens",
        "early stages of pyramids: global attention between s² times fewer tokens.",
    ),
    "taylor_shift": (
        "yᵢ = Σⱼ (½sᵢⱼ² + sᵢⱼ + 1) vⱼ / Σⱼ (½sᵢⱼ² + sᵢⱼ + 1), s = τ·cos(qᵢ, kⱼ)",
        "many tokens and narrow heads: exact, and linear above D² + D + 1 tokens.",
    ),
    "window": (
        "yᵢ = Σ over i's window of softmaxⱼ(qᵢ·kⱼ / √D + b(j - i)) vⱼ",
        "the safe choice in pyramids; shift every other block, or put `channel` between.",
    ),
}


def gallery() -> str:
    """Return a section for each mixer, in Markdown."""
    forms: dict[str, list[str]] = {}
    for spec in compare_parser().read_config(RECIPE)["mixers"]:
        options = ", ".join(f"{k}={v!r}" for k, v in spec.items() if k not in ("type", "label"))
        if options:
            forms.setdefault(spec["type"], []).append(f"`{spec['label']}`: `{options}`")
    return "\n\n".join(_entry(name, forms.get(name, [])) for name in sorted(MIXERS))


def _entry(name: str, forms: list[str]) -> str:
    cls = MIXERS[name]
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    doc = inspect.getdoc(cls) or ""
    formula, when = ABOUT[name]
    with torch.device("meta"):
        mixer = build_mixer(name, 64, 2)
    assert mixer is not None
    costs = list(dict.fromkeys(COST.findall(doc.split("\nArgs:")[0])))
    own = dict.fromkeys([*PAPER.findall(module.split("\n\n")[0]), *PAPER.findall(doc.split("\n\n")[0])])
    others = [paper for paper in dict.fromkeys(PAPER.findall(doc)) if paper not in own]
    summary = " ".join(doc.split("\n\n")[0].split())
    takes = [
        "any height and width",
        "class tokens take part" if mixer.takes_prefix_tokens else "class tokens pass by",
        "reducers may stand before it" if mixer.takes_dropped_tokens else "no dropped tokens",
    ]
    lines = [f"### `{name}`", _linked(summary), f"    {formula}"]
    facts = [f"- Cost: {', '.join(costs[:4])}"]
    facts += [f"- Paper: {', '.join(map(_link, own))}"] if own else []
    facts += [f"- Papers of its forms: {', '.join(map(_link, others))}"] if others else []
    facts += [f"- Takes: {'; '.join(takes)}", f"- Use it for {when}"]
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
