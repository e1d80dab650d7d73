"""On small maps "auto" takes torch's operation as far as a table of measurements says, and no further."""

import ctypes

import pytest
import torch

import visionzoo
from visionzoo.kernels import (
    depthwise_conv,
    dispatch,
    explain,
    group_norm,
    launch,
    layer_norm,
    linear_attention,
    small_maps,
)
from visionzoo.kernels.small_maps import BOTH, FORWARD, Limit, read_table, recorded
from visionzoo.testing import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def limit(operation, measure, numbers, dtype="float32", gpu=None):
    gpu = small_maps.device_name(DEVICE) if gpu is None else gpu
    return Limit(gpu, operation, measure, dtype, numbers, 1.5, 2.0, "2.11", "3.6", "1", "2026-11-28", "benchmark")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write a table; the device counts as a GPU."""

    def write(*limits):
        lines = [",".join(map(str, line)) for line in (Limit._fields, *limits)]
        (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
        small_maps.forget()

    monkeypatch.setenv(small_maps.ENVIRONMENT_VARIABLE, str(tmp_path / "table.csv"))
    monkeypatch.setattr(dispatch, "_why_not", lambda *_: None)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    yield write
    small_maps.forget()


def maps(*size, dtype=torch.float32, **options):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).requires_grad_(**options)


def ran(operation, *args, **arguments):
    with explain() as decisions:
        operation(*args, **arguments)
    return decisions[0].backend


def attend(x):
    return linear_attention(x, x, x, feature_map="relu")


def test_a_limit_holds_for_its_operation_direction_and_dtype_up_to_its_numbers(table):
    table(limit("linear_attention", FORWARD, 2 * 3 * 2 * 16))
    small, large = maps(1, 2, 3, 2, 16, requires_grad=False), maps(1, 1, 13, 1, 16, requires_grad=False)
    with explain() as decisions:
        attend(small)
    assert decisions[0].backend == "reference"
    assert decisions[0].reason == "torch's operation is the faster forward up to 192 numbers on this GPU (table.csv)"
    assert ran(attend, large) == "triton"
    learning = small.clone().requires_grad_()
    assert ran(attend, learning) == "triton"  # with a backward pass to come
    with torch.no_grad():
        assert ran(attend, learning) == "reference"
    assert ran(attend, small.half()) == "triton"
    assert ran(group_norm, small.flatten(3), *maps(2, 32)) == "triton"
    table(limit("linear_attention", BOTH, 192))
    assert ran(attend, learning) == "reference" and ran(attend, small) == "triton"


def test_float16_goes_by_what_bfloat16_took(table):
    table(limit("linear_attention", FORWARD, 10**6, "bfloat16"))
    x = maps(1, 2, 3, 2, 16, requires_grad=False)
    assert [ran(attend, x.to(dtype)) for dtype in (torch.float16, torch.float32)] == ["reference", "triton"]


@pytest.mark.parametrize("rows", [[], [limit("linear_attention", FORWARD, 10**6, gpu="another")]])
def test_a_gpu_without_a_row_goes_on_as_before(table, rows):
    table(*rows)
    assert ran(attend, maps(1, 2, 3, 2, 16, requires_grad=False)) == "triton"


def test_what_never_was_faster_is_a_row_and_changes_nothing(table):
    table(limit("linear_attention", FORWARD, 0))
    assert ran(attend, maps(0, 2, 3, 2, 16, requires_grad=False)) == "triton"


def test_names_graphs_and_compilers_are_not_led_by_the_table(table, monkeypatch):
    table(limit("linear_attention", FORWARD, 10**6))
    x = maps(1, 2, 3, 2, 16, requires_grad=False)
    assert ran(attend, x) == "reference"
    with recorded():
        assert ran(attend, x) == "triton"
    assert ran(linear_attention, x, x, x, feature_map="relu", backend="triton") == "triton"
    with visionzoo.use_backend("triton"):
        assert ran(attend, x) == "triton"
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(attend, backend=backend, fullgraph=True)(x)
    assert any("visionzoo.linear_attention" in name for name in seen)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for capturing, backend in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert dispatch.choose("linear_attention", "auto", x) == backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_torchs_operations_give_what_the_specification_gives(table, dtype, autocast):
    rows = [limit(name, BOTH, 10**6, str(dtype).removeprefix("torch.")) for name in ("depthwise_conv", "group_norm")]
    table(*rows)
    x, other = (maps(2, 5, 4, 6, dtype=dtype) * factor for factor in (1, 2))
    weight, bias = maps(6, 1, 3, 3, dtype=dtype), maps(6, dtype=dtype)
    calls = (
        (depthwise_conv, (x, weight), {}),
        (depthwise_conv, (x, weight, bias), {"residual": other}),
        (depthwise_conv, (x, weight, bias), {"residual": other.float()}),
        (group_norm, (x, maps(6, dtype=torch.float32), maps(6, dtype=torch.float32) + 1), {"eps": 1e-3}),
    )
    for function, args, options in calls:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            assert ran(function, *args, **options) == "library"
            out = function(*args, **options)
            expected = function(*args, **options, backend="reference")
        assert out.dtype == expected.dtype and out.shape == expected.shape
        tolerance = 1e-5 if dtype == torch.float32 and not autocast else 2e-2
        assert relative_error(out, expected) < tolerance
        gradients = (torch.autograd.grad(y.float().square().sum(), args) for y in (out, expected))
        for one, another in zip(*gradients, strict=True):
            assert relative_error(one, another) < 2 * tolerance


def test_what_torch_has_no_operation_for_stays_with_the_kernels(table):
    table(limit("depthwise_conv", BOTH, 10**6))
    x, weight = maps(1, 4, 4, 8), maps(8, 1, 3, 3)
    assert ran(depthwise_conv, x, weight) == "library"
    assert ran(depthwise_conv, x, weight, regions=2) == "triton"


def test_layer_norm_keeps_its_own_rule_in_front(table):
    table()
    x = maps(2, 16, requires_grad=False)
    with explain() as decisions:
        layer_norm(x, x[0], x[1])
    assert "16384 rows" in decisions[0].reason


def test_the_table_of_the_package_can_be_read_and_another_file_is_refused(table, tmp_path):
    for row in read_table(small_maps.TABLE):
        assert row.operation in dispatch.OPERATIONS and row.measure in (FORWARD, BOTH) and row.numbers >= 0
        assert getattr(torch, row.dtype).is_floating_point and row.library_us > 0 and row.triton_us > 0
        assert row.gpu and row.torch and row.triton and row.date and row.command
    for text, message in (("a,b\n", "expected the columns gpu,operation"), (None, "line 2: could not convert")):
        bad = limit("linear_attention", FORWARD, 1)._replace(library_us="fast")
        (tmp_path / "bad.csv").write_text(text or "\n".join(",".join(map(str, row)) for row in (Limit._fields, bad)))
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / "bad.csv")


def test_an_empty_variable_turns_the_table_off(table, monkeypatch):
    table(limit("linear_attention", FORWARD, 10**6))
    monkeypatch.setenv(small_maps.ENVIRONMENT_VARIABLE, "")
    assert ran(attend, maps(1, 2, 3, 2, 16, requires_grad=False)) == "triton"


def test_backends_says_what_small_maps_take(table, monkeypatch):
    table(limit("linear_attention", FORWARD, 12544), limit("linear_attention", BOTH, 6272))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(small_maps, "device_name", lambda _: small_maps._table()[0].gpu)
    assert visionzoo.backends()["linear_attention"] == (
        "triton (torch's operation up to 12,544 numbers forward in float32, 6,272 numbers forward+backward in float32)"
    )
    assert visionzoo.backends()["halo_attention"] == "triton"
    monkeypatch.setattr(dispatch, "NOT_PAYING", {"halo_attention"})
    expected = "reference (measured on a GPU, its kernels do not pay)"
    assert visionzoo.backends()["halo_attention"] == expected


def test_kernels_are_loaded_in_recordings_in_the_mode_that_allows_it(monkeypatch):
    asked, mode = [], [0]

    class Driver:
        def __init__(self, name):
            assert "cuda" in name

        def cuThreadExchangeStreamCaptureMode(self, given):
            given._obj.value, mode[0] = mode[0], given._obj.value
            asked.append(mode[0])

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(torch.version, "hip", None)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        with pytest.raises(RuntimeError), launch._may_load(torch.device("cuda")):
            assert mode == [2 if capturing else 0]
            raise RuntimeError
        assert mode == [0]
    assert asked == [2, 0]


@pytest.mark.gpu
def test_a_recording_without_a_warm_up_runs_the_kernels_and_loads_them(table):
    table(limit("linear_attention", FORWARD, 10**6))
    x = maps(1, 3, 5, 1, 48, requires_grad=False)  # a head width that no other test has
    expected, graph = attend(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), explain() as decisions:
        out = attend(x)
    graph.replay()
    assert decisions[0].backend == "triton"
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
