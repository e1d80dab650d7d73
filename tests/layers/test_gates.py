"""Every gate is the authors' function on any map, stands in every family, and says what it cannot do."""

import re

import numpy as np
import pytest
import torch
from golden import RECORDS, Record, relative_error
from tape import assert_recorded_alike
from timm.layers import EcaModule, SqueezeExcite, create_attn
from timm.models._features_fx import create_feature_extractor

from visionzoo.layers import gates
from visionzoo.layers.gates import GATES, GateNCHW, build_gate
from visionzoo.layers.gates.from_timm import TimmGate

RECORD_NAMES = sorted(path.stem for path in (RECORDS / "gates").glob("*.json"))
WIDTH = 32  # channels that every gate fits with its defaults

# gate -> (pattern, replacement) of the authors' tensor names
NAMES = {
    "eca": [("^", "layer.")],
    "coord": [("^", "layer.")],
    "cbam": [
        (r"^ChannelGate\.mlp\.(\d)", lambda m: f"mlp.{int(m[1]) - 1}"),
        (r"^SpatialGate\.spatial\.", "spatial."),
        (r"\.bn\.", ".norm."),
    ],
    "triplet": [
        (r"^cw\.conv\.", "over_height."),
        (r"^hc\.conv\.", "over_width."),
        (r"^hw\.conv\.", "over_channels."),
        (r"\.bn\.", ".norm."),
    ],
    "ela": [(r"^gn\.", "norm.")],
    "psa": [
        (r"^conv_up", "channel_up"),
        (r"^conv_([qv])_right", r"channel_\1"),
        (r"^conv_([qv])_left", r"spatial_\1"),
    ],
    "ulsam": [
        (r"^subspaces\.\d+\.conv_dws", "depthwise.conv"),
        (r"^subspaces\.\d+\.bn_dws", "depthwise.norm"),
        (r"^subspaces\.\d+\.conv_point", "point.conv"),
        (r"^subspaces\.\d+\.bn_point", "point.norm"),
    ],
    "efficient_attention": [
        (r"^keys\.", "k."),
        (r"^queries\.", "q."),
        (r"^values\.", "v."),
        (r"^reprojection\.", "proj."),
    ],
    "magc": [
        (r"^conv_mask\.", "scores."),
        (r"^channel_(add|mul|concat)_conv\.", "mlp."),
        (r"^cat_conv\.", "merge."),
    ],
    "a2n": [
        (r"^conv_first", "first"),
        (r"^conv_last", "last"),
        (r"^ADM\.", "weights."),
        (r"^attention\.k1\.", "gate.0."),
        (r"^attention\.k2\.", "gate.2."),
        (r"^attention\.k3\.", "attended."),
        (r"^attention\.k4\.", "attended_out."),
        (r"^non_attention\.", "plain."),
    ],
    "pixel": [(r"^conv\.", "linear.")],
}
# what the records say in the authors' words
SPECS = {
    "a2n_aab": "a2n",
    "cbam": "cbam",
    "eca": {"type": "eca", "kernel_size": 3},
    "efficient_attention": {"type": "efficient_attention", "num_heads": 8},
    "ela_b": {"type": "ela", "variant": "b"},
    "psa_p": {"type": "psa", "variant": "p"},
    "psa_s": {"type": "psa", "variant": "s"},
    "triplet": "triplet",
    "ulsam": "ulsam",
}


def _our_name(kind, name):
    for pattern, replacement in NAMES[kind]:
        name = re.sub(pattern, replacement, name)
    return name


def _gate_of(record, spec):
    """Build the gate of a record with the record's weights; 1×1 convolutions are linear layers here."""
    kind = spec if isinstance(spec, str) else spec["type"]
    parts = {}
    for name, value in record.state_dict().items():
        parts.setdefault(_our_name(kind, name), []).append(value)
    dim = record.image().shape[1] if "input_shape" in record.meta else record.meta["constructor"]["nf"]
    gate = build_gate(spec, dim).double().eval()
    state = {
        name: (torch.cat(values) if values[0].ndim else values[0]).reshape(gate.state_dict()[name].shape)
        for name, values in parts.items()
    }
    gate.load_state_dict(state)
    return gate, kind


def _sampled(tensor, count):
    flat = tensor.detach().contiguous().reshape(-1).numpy()
    return flat if flat.size <= count else flat[np.random.RandomState(flat.size % 2**31).randint(0, flat.size, count)]


def _run(gate, x):
    """Outputs [B, C, H, W] and gradients for x, as the records take them."""
    x = x.clone().requires_grad_()
    out = GateNCHW(gate)(x)
    (out * torch.from_numpy(np.random.RandomState(4).standard_normal(out.shape))).sum().backward()
    return out, x.grad


@pytest.mark.parametrize("name", RECORD_NAMES)
def test_outputs_and_gradients_are_the_authors(name):
    record = Record(f"gates/{name}")
    gate, kind = _gate_of(record, record.meta.get("gate", SPECS.get(name)))
    if "inputs_spec" in record.meta:
        seed, shape = record.meta["inputs_spec"]["x"]
        x = torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))
    else:
        x = record.image()
    out, grad = _run(gate, x)
    assert relative_error(_sampled(out, 512), record.arrays["out"]) <= record.tolerance()
    if "change" in record.arrays:  # of outputs that are close to the input
        assert relative_error(_sampled(out - x, 512), record.arrays["change"]) <= record.tolerance()
    if "grad_x" in record.arrays:
        assert relative_error(_sampled(grad, 512), record.arrays["grad_x"]) <= 1e-9
    parameters = {}
    for key in record.arrays:
        if key.startswith("grad/"):
            parameters.setdefault(_our_name(kind, key.removeprefix("grad/")), []).append(key)
    for ours, theirs in parameters.items():
        own = gate.get_parameter(ours).grad.chunk(len(theirs))
        for part, key in zip(own, theirs, strict=True):
            expected = record.arrays[key]
            assert np.abs(_sampled(part, 64) - expected).max() <= 1e-9 * max(1, np.abs(expected).max()), key


def test_every_gate_that_is_ours_has_a_record():
    specs = [Record(f"gates/{name}").meta.get("gate", SPECS.get(name)) for name in RECORD_NAMES]
    recorded = {spec if isinstance(spec, str) else spec["type"] for spec in specs}
    assert {name for name, gate in GATES.items() if not issubclass(gate, TimmGate)} <= recorded


@pytest.mark.parametrize(
    ("spec", "theirs"),
    [
        ("eca", lambda: EcaModule(WIDTH)),
        ("ceca", lambda: create_attn("ceca", WIDTH)),
        (
            {"type": "se", "reduction": 8, "max_pool": True},
            lambda: SqueezeExcite(WIDTH, rd_channels=4, add_maxpool=True),
        ),
        ("ese", lambda: create_attn("ese", WIDTH)),
        ({"type": "ge", "extent": 4}, lambda: create_attn("ge", WIDTH, extent=4, use_mlp=False)),
        ({"type": "gc", "fusion": "both"}, lambda: create_attn("gc", WIDTH, rd_channels=2, fuse_add=True)),
        ({"type": "gc", "reduction": 8, "fusion": "mul"}, lambda: create_attn("gc", WIDTH)),
        ({"type": "gc", "reduction": 8}, lambda: create_attn("gca", WIDTH)),
        ({"type": "coord", "bias": False, "residual": True}, lambda: create_attn("coord", WIDTH, has_skip=True)),
        ({"type": "scoord", "reduction": 4}, lambda: create_attn("scoord", WIDTH, rd_channels=8)),
        ("strip", lambda: create_attn("strip", WIDTH)),
        (
            {"type": "strip", "kernel_size": None, "residual": True},
            lambda: create_attn("strip", 1, use_conv=False, has_skip=True),
        ),
    ],
)
def test_gates_from_timm_are_timms(spec, theirs):
    torch.manual_seed(0)
    gate, theirs = build_gate(spec, WIDTH).double(), theirs().double()
    gate.layer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, WIDTH, 6, 9, dtype=torch.float64)
    (out, grad), expected = _run(gate, x), theirs(y := x.clone().requires_grad_())
    (expected * torch.from_numpy(np.random.RandomState(4).standard_normal(out.shape))).sum().backward()
    assert relative_error(out.detach(), expected.detach()) <= 1e-12
    assert relative_error(grad, y.grad) <= 1e-12


# -- what all gates do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 3), (2, 13)])
def test_any_height_and_width_keep_their_size_and_give_gradients(name, size):
    gate = build_gate(name, WIDTH)
    x = torch.randn(2, *size, WIDTH, requires_grad=True)
    out = gate(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    out.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert all(p.grad is not None for p in gate.parameters())


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_float64(name, dtype):
    torch.manual_seed(0)
    gate = build_gate(name, WIDTH).double().eval()
    x = torch.randn(1, 6, 9, WIDTH, dtype=torch.float64)
    exact = gate(x)
    low = gate.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.double() - exact).norm() < 40 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", GATES)
def test_autocast_runs_and_stays_near_float32(name):
    torch.manual_seed(0)
    gate = build_gate(name, WIDTH).eval()
    x = torch.randn(1, 6, 9, WIDTH, requires_grad=True)
    exact = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(x)
        out.float().sum().backward()
    assert (out.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", GATES)
def test_compiles_into_one_graph_for_sizes_that_change(name):
    torch._dynamo.reset()
    gate = build_gate(name, WIDTH).eval()
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend="eager")
    for size in [(6, 9), (11, 7)]:
        x = torch.randn(2, *size, WIDTH)
        torch.testing.assert_close(compiled(x), gate(x))


@pytest.mark.parametrize("name", GATES)
def test_each_can_be_recorded_as_a_cuda_graph(name):
    assert_recorded_alike(build_gate(name, WIDTH), torch.randn(2, 4, 6, WIDTH))


@pytest.mark.parametrize("name", GATES)
def test_exports_for_any_batch_and_size(name):
    gate = build_gate(name, WIDTH).eval()
    auto = torch.export.Dim.DYNAMIC
    program = torch.export.export(gate, (torch.randn(2, 6, 9, WIDTH),), dynamic_shapes=({0: auto, 1: auto, 2: auto},))
    x = torch.randn(3, 11, 8, WIDTH)
    torch.testing.assert_close(program.module()(x), gate(x))


@pytest.mark.parametrize("name", GATES)
def test_torch_fx_sees_one_node(name):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = build_gate(name, WIDTH)

        def forward(self, x):
            return self.gate(x)

    graph = create_feature_extractor(Net(), ["gate"])
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["gate"]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
@torch.no_grad()
def test_one_sample_of_one_row_has_the_gates_it_has_beside_another(size):
    gate = build_gate({"type": "ela", "variant": "t"}, WIDTH).double()  # a norm group for each channel
    x = torch.randn(2, *size, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(gate(x[:1]), gate(x)[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_no_samples_are_no_error(name):
    gate = build_gate(name, WIDTH).eval()
    assert gate(torch.randn(0, 6, 9, WIDTH)).shape == (0, 6, 9, WIDTH)


@pytest.mark.parametrize("name", GATES)
def test_the_nchw_adapter_computes_what_the_gate_does(name):
    torch.manual_seed(0)
    gate = build_gate(name, WIDTH).eval()
    layer = GateNCHW(gate)
    x = torch.randn(2, WIDTH, 6, 9)
    expected = gate(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        out = layer(given)
        assert torch.equal(out, expected) and out.is_contiguous(memory_format=torch.channels_last)
    assert set(layer.state_dict()) == {f"gate.{key}" for key in gate.state_dict()}
    with pytest.raises(
        ValueError, match=rf"GateNCHW: expected a map \[B, C, H, W\] with C = 32, got .*{type(gate).__name__}"
    ):
        layer(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", GATES)
def test_the_docstring_gives_cost_dtypes_and_an_example_and_the_import_is_short(name):
    doc = GATES[name].__doc__
    assert "O(N" in doc and "dtype of the input" in doc and ">>>" in doc and "Raises:" in doc
    assert GATES[name].__name__ in gates.__all__


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("shape", [(6, 9, 32), (1, 2, 6, 9, 32), (2, 32, 6, 9), (2, 6, 9, 8), (2, 0, 9, 32), (32,)])
def test_what_is_no_map_of_the_gate_is_refused_with_its_shape(name, shape):
    gate = build_gate(name, WIDTH)
    with pytest.raises(ValueError) as error:
        gate(torch.randn(shape))
    assert f"{type(gate).__name__}: expected a map [B, H, W, C] with C = 32, got {shape}" in str(error.value)
    assert "layers.gates.GateNCHW" in str(error.value)


@pytest.mark.parametrize("name", sorted(set(GATES) - {"ge"}))  # which has no weights
def test_a_map_of_another_dtype_than_the_weights_is_refused(name):
    with pytest.raises(ValueError, match=f"{GATES[name].__name__}: expected a floating point map .*got torch.float64"):
        build_gate(name, WIDTH)(torch.ones(1, 6, 9, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize(
    ("spec", "dim", "message"),
    [
        ("tripplet", 32, r"unknown gate 'tripplet' \(did you mean 'triplet'\?\); expected one of a2n, "),
        ({"kernel_size": 3}, 32, "unknown gate None; expected one of"),
        (3, 32, r"gate: expected a name or dict\(type=name, \*\*options\), got 3"),
        ({"type": "eca", "kernel": 3}, 32, r"'eca' does not take these options: kernel=3 \(did you mean 'kernel_size'"),
        ({"type": "eca", "kernel_size": 3.0}, 32, r"kernel_size must be int \| None, got kernel_size=3.0"),
        ({"type": "eca", "kernel_size": 4}, 32, "kernel_size must be odd and positive, got kernel_size=4"),
        ({"type": "eca", "gamma": 0}, 32, "gamma must be positive, got gamma=0"),
        ("ceca", 2, "dim=2 channels are fewer than the kernel's 3"),
        ("cbam", 8, r"nothing remains of dim=8 channels with reduction=16; pass a reduction of at most 8"),
        ("se", 8, r"SqueezeExciteGate: nothing remains of dim=8 channels with reduction=16"),
        ({"type": "cbam", "pool_types": ("avg", "mean")}, 32, r"pool_types must be some of .*'mean'"),
        ({"type": "cbam", "pool_types": ()}, 32, r"pool_types must be some of .*got pool_types=\(\)"),
        ({"type": "cbam", "pool_types": "avg"}, 32, r"pool_types must be tuple\[str, ...\], got pool_types='avg'"),
        ({"type": "cbam", "kernel_size": 2}, 32, "kernel_size must be odd"),
        ({"type": "triplet", "kernel_size": 0}, 32, "kernel_size must be odd and positive, got kernel_size=0"),
        ({"type": "ela", "variant": "x"}, 32, r"variant must be one of \('t', 'b', 's', 'l'\), got variant='x'"),
        (
            "ela",
            24,
            r"norm_groups must divide dim, got dim=24 and norm_groups=16; pass one of \[1, 2, 3, 4, 6, 8, 12, 24\]",
        ),
        ({"type": "ela", "variant": "l"}, 20, "have 8 channels, which do not divide dim=20; pass conv_groups"),
        (
            {"type": "psa", "variant": "q"},
            32,
            r"variant must be 'p' \(parallel\) or 's' \(sequential\), got variant='q'",
        ),
        ({"type": "psa", "variant": "s"}, 6, "nothing remains of half of dim=3 channels with reduction=4"),
        ("psa", 1, "nothing remains of dim=1 channels"),
        ("ulsam", 30, r"num_splits must divide dim, got dim=30 and num_splits=4; pass one of \[1, 2, 3, 5"),
        ({"type": "efficient_attention", "num_heads": 3}, 32, "num_heads must divide key_dim, got key_dim=32"),
        ({"type": "efficient_attention", "num_heads": 4, "value_dim": 6}, 32, "must divide value_dim, got value_dim=6"),
        ({"type": "efficient_attention", "key_dim": 0}, 32, "key_dim must be positive, got key_dim=0"),
        ({"type": "magc", "num_heads": 5}, 32, "num_heads must divide dim, got dim=32 and num_heads=5"),
        ("magc", 8, "nothing remains of dim=8 channels with ratio=0.0625; pass a ratio of 0.125 or more"),
        ({"type": "magc", "fusion": "sum"}, 32, "fusion 'add', 'mul' or 'concat', got pooling='att' and fusion='sum'"),
        ({"type": "a2n", "temperature": 0}, 32, "temperature must be positive, got temperature=0"),
        ({"type": "a2n", "plain_kernel": 2}, 32, "plain_kernel must be odd"),
        ({"type": "ge", "extent": 3}, 32, "extent must be even, 0 for the whole map, got extent=3"),
        ({"type": "gc", "fusion": "cat"}, 32, "fusion must be 'add', 'mul' or 'both', got fusion='cat'"),
        ({"type": "coord", "reduction": 0}, 32, "reduction must be positive, got reduction=0"),
        ({"type": "strip", "kernel_size": 2}, 32, "kernel_size must be odd"),
    ],
)
def test_wrong_specs_are_named(spec, dim, message):
    with pytest.raises(ValueError, match=message):
        build_gate(spec, dim)


@pytest.mark.parametrize("name", GATES)
def test_no_channels_are_refused(name):
    with pytest.raises(ValueError, match="dim must be positive, got dim=0"):
        build_gate(name, 0)
