"""Every fast way against the plain networks."""

import ctypes
import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from maskgit import MaskGIT, engine
from maskgit.engine import (
    Engine,
    alternatives,
    choose,
    host,
    prepare_convolutions,
    replace_linears,
)
from maskgit.engine.graphs import GraphedSteps
from maskgit.engine.host import cpu_quota, keep_freed_memory
from maskgit.engine.layers import (
    PATHS,
    Int8Linear,
    MergedUpsample,
    MklLinear,
    PackedConvolution,
    PackedResBlock,
    adds_in_32_bits,
    can_pack,
    ways,
)
from maskgit.errors import ConfigError
from maskgit.networks.config import TokenizerConfig
from maskgit.networks.tokenizer import ResBlock, Tokenizer, Upsample
from maskgit.sampler.policies import POLICIES
from ties import assert_same_tokens

# Before the tests' own measure takes its place.
MEASURE = host._measure


@pytest.fixture(scope="module")
def bundled():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def expected(bundled):
    return bundled.generate(["frog", "ship", "cat"], num_images=4, seed=3)


def test_every_float32_way_makes_the_same_tokens_and_pixels(bundled, expected, float32):
    model = bundled.optimize(**float32)
    assert (model.engine.dtype, model.engine.linear) == ("float32", float32["linear"])
    made = model.generate(["frog", "ship", "cat"], num_images=4, seed=3)
    assert_same_tokens(made.tokens, expected.tokens)
    assert (model.decode_tokens(expected.tokens) - expected.images).abs().max() < 1e-5


@torch.no_grad()
def test_every_form_stays_near(bundled, expected, form):
    # What a network computes is compared, not what is sampled: one other token leads to another image.
    model = bundled.optimize(**form)
    bound = {"bfloat16": 0.03, "float32": 1e-4}[model.engine.dtype] if not model.engine.quantize else 0.05
    sequence = bundled.vocabulary.sequence(torch.tensor([6, 8, 3]))
    sequence[:, 1:30] = expected.tokens[:3].flatten(1)[:, :29]
    plain, fast = bundled.predict_logits(sequence), model.predict_logits(sequence).float()
    assert (fast - plain).std() < bound * plain.std()
    assert (fast - plain).abs().max() < 10 * bound * plain.std()
    pixels = model.decode_tokens(expected.tokens)
    assert (pixels - expected.images).abs().mean() < 2 / 255
    agreement = (
        (model.encode_pixels(expected.images) == bundled.encode_pixels(expected.images)).float().mean()
    )
    assert agreement > 0.9


def test_an_image_does_not_depend_on_its_companions(bundled, form):
    model = bundled.optimize(**form)
    if model.engine.dtype == "bfloat16":
        pytest.skip("in bfloat16 a batch of another size may be rounded otherwise")
    whole = model.generate(["frog", "ship"], num_images=3, seed=4, steps=6).tokens
    alone = model.generate(["frog", "ship"], num_images=3, seed=4, steps=6, batch_size=1).tokens
    assert torch.equal(whole, alone)


def test_the_model_it_is_made_from_stays_as_it_is(bundled, expected, form):
    before = {name: (p.data_ptr(), p.dtype, p.stride()) for name, p in bundled.transformer.named_parameters()}
    before |= {name: (p.data_ptr(), p.dtype, p.stride()) for name, p in bundled.tokenizer.named_parameters()}
    bundled.optimize(**form).generate("frog", steps=1)
    after = {name: (p.data_ptr(), p.dtype, p.stride()) for name, p in bundled.transformer.named_parameters()}
    after |= {name: (p.data_ptr(), p.dtype, p.stride()) for name, p in bundled.tokenizer.named_parameters()}
    assert before == after
    assert torch.equal(bundled.generate("frog", num_images=4, seed=3).tokens, expected.tokens[:4])


def test_an_optimized_model_is_neither_saved_moved_nor_optimized(bundled, tmp_path):
    model = bundled.optimize("exact")
    with pytest.raises(ConfigError, match="save the model that it was made from"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="stays where it is"):
        model.to("cpu")
    with pytest.raises(ConfigError, match="optimized already"):
        model.optimize("fast")


@pytest.fixture
def any_device(monkeypatch):
    """A machine that has every device, of which none is used."""
    monkeypatch.setattr(engine, "choose_device", torch.device)


def test_choices_that_do_not_go_together_are_refused(any_device):
    with pytest.raises(ConfigError, match="Unknown mode 'slow'"):
        choose("slow")
    with pytest.raises(ConfigError, match="Unknown dtype 'float8'"):
        choose("exact", device="cpu", dtype="float8")
    with pytest.raises(ConfigError, match="take and give float32"):
        choose("int8", device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="int8 is for CPUs"):
        choose("int8", device="cuda")
    with pytest.raises(ConfigError, match="Unknown linear 'cublas'"):
        choose("exact", device="cpu", linear="cublas")
    with pytest.raises(ConfigError, match="bfloat16 cannot go the way 'mkl'"):
        choose("exact", device="cpu", dtype="bfloat16", linear="mkl")
    with pytest.raises(ConfigError, match="float32 cannot go the way 'onednn' on this machine's mps"):
        choose("exact", device="mps", linear="onednn")


ALL = {torch.float32: tuple(PATHS), torch.bfloat16: ("torch", "onednn")}


@pytest.fixture
def every_way(monkeypatch):
    """A CPU that can do all, of which nothing is run."""
    for module in (engine, host):
        monkeypatch.setattr(module, "ways", lambda dtype: ALL[dtype])


def test_modes_choose_what_the_machine_is_good_at(monkeypatch, every_way, any_device):
    times = {
        "float32 torch": 3.0, "float32 mkl": 2.0, "float32 onednn": 4.0,
        "bfloat16 torch": 30.0, "bfloat16 onednn": 20.0, "int8 int8": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(host, "measured", lambda **_: times)
    assert choose("exact", device="cpu").linear == "mkl"
    assert choose("exact", device="cpu", linear="onednn").linear == "onednn"
    fast = choose("fast", device="cpu")
    assert (fast.dtype, fast.quantize) == ("float32", "int8")
    times["bfloat16 onednn"] = 0.5
    fast = choose("fast", device="cpu")
    assert (fast.dtype, fast.quantize, fast.linear) == ("bfloat16", "", "onednn")
    compiled = choose("fast", device="cpu", compile=True)
    assert (compiled.dtype, compiled.linear, compiled.compile) == ("bfloat16", "torch", True)
    times |= {"bfloat16 onednn": 20.0, "int8 int8": 1.9}
    fast = choose("fast", device="cpu")
    assert (fast.dtype, fast.quantize) == ("float32", "")
    gpu = choose("exact", device="cuda")
    assert (gpu.dtype, gpu.linear, gpu.compile, gpu.graphs) == ("float32", "torch", False, False)


def test_what_is_open_does_not_depend_on_a_measurement(every_way, any_device):
    # Nothing may be measured here: see conftest.
    assert [one.linear for one in alternatives("exact", device="cpu")] == ["torch", "mkl", "onednn"]
    fast = [(one.dtype, one.quantize or one.linear) for one in alternatives("fast", device="cpu")]
    assert fast == [
        ("float32", "torch"), ("float32", "mkl"), ("float32", "onednn"),
        ("bfloat16", "torch"), ("bfloat16", "onednn"), ("float32", "int8"),
    ]  # fmt: skip
    (only,) = alternatives("fast", device="mps")
    assert choose("fast", device="mps") == only


@pytest.mark.parametrize("given", [(), ("torch",), ("torch", "mkl"), ("torch", "onednn")])
def test_an_engine_that_the_machine_lacks_is_refused(bundled, monkeypatch, given):
    given = tuple(way for way in given if way in ways(torch.float32))
    monkeypatch.setattr(engine, "ways", lambda dtype: given)
    for way in ("torch", "mkl", "onednn"):
        asked = Engine(linear=way)
        if way in given:
            engine.build(bundled, asked)
        else:
            with pytest.raises(ConfigError, match=f"no {way!r} products of float32"):
                engine.build(bundled, asked)


def test_what_was_measured_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    counted = []
    first = {name: float(number) for number, name in enumerate(host.names(), 1)}
    monkeypatch.setattr(host, "_measure", lambda: counted.append(1) or dict(first))
    assert host.measured() == first
    assert host.measured() == first
    assert len(counted) == 1
    (file,) = (tmp_path / "cpu").iterdir()
    # Whoever shares the cache can read it, as any file that they share.
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode
    # What another process wrote in the meantime holds for this one, too.
    other = {name: seconds + 1 for name, seconds in first.items()}
    assert host.keep(file, other, replace=False) == first
    for broken in (
        "",
        "[]",
        '{"float32 torch": -1}',
        '{"float32 torch": 1.0, "bfloat16 torch": 1.0, "x": 1.0}',
    ):
        file.write_text(broken)
        assert host.measured() == first
    assert host.measured(refresh=True) == first
    assert len(counted) == 6


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(host, "_measure", lambda: {"float32 torch": 2.0})
    assert host.measured() == {"float32 torch": 2.0}


def test_measuring_finds_every_way_that_is_there():
    times = MEASURE()
    assert all(seconds > 0 for seconds in times.values())
    assert [name for name in times if name.startswith("float32 ")] == [
        f"float32 {way}" for way in ways(torch.float32) if way != "int8"
    ]
    assert "bfloat16 torch" in times


def test_times_of_other_ways_are_not_used(tmp_path, monkeypatch):
    # As where oneDNN may use fewer instructions than the CPU has.
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    monkeypatch.setattr(host, "_measure", lambda: dict.fromkeys(host.names(), 1.0))
    every = host.measured()
    monkeypatch.setattr(host, "ways", lambda dtype: ("torch",))
    assert list(host.measured()) == ["float32 torch", "bfloat16 torch"] != list(every)


@pytest.mark.parametrize("policy", POLICIES)
def test_captured_steps_make_the_same_tokens(bundled, policy):
    # The path of CUDA graphs without the capture: padded batches, inputs at fixed places, settings as tensors.
    model = bundled.optimize("exact", linear="torch")
    model.decode_step = GraphedSteps(capture=False, compile_noise=False)
    for settings in ({"steps": 5}, {"steps": 3, "temperature": 0.8, "guidance_scale": 1.5}):
        made = model.generate(["frog", "ship", "cat"], seed=2**63 + 1, policy=policy, **settings)
        plain = bundled.generate(["frog", "ship", "cat"], seed=2**63 + 1, policy=policy, **settings)
        assert_same_tokens(made.tokens, plain.tokens)


def test_other_settings_need_no_other_capture(bundled):
    model = bundled.optimize("exact")
    model.decode_step = steps = GraphedSteps(capture=False, compile_noise=False)
    model.generate(["frog", "ship", "cat"], seed=1, steps=3)
    count = len(steps._programs)
    model.generate(
        ["truck"] * 4, seed=2, steps=4, temperature=0.9, choice_temperature=1.0, guidance_scale=2.0
    )
    assert len(steps._programs) == count


@torch.no_grad()
@pytest.mark.parametrize("sides", [(1, 1), (4, 7)])
def test_a_merged_upsampling_is_the_upsampling(sides):
    torch.manual_seed(0)
    layer = Upsample(6).double()
    x = torch.randn(2, 6, *sides, dtype=torch.float64)
    merged = MergedUpsample(layer, packed=False)
    # Its weights are merged in float32.
    torch.testing.assert_close(merged(x), layer(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_convolutions_compute_the_same(dtype):
    if not can_pack(dtype):
        pytest.skip(f"oneDNN packs no convolutions of {dtype} on this CPU")
    torch.manual_seed(0)
    config = TokenizerConfig(filters=32, channel_multipliers=(1, 2), embedding_dim=16, codebook_size=64)
    plain = Tokenizer(config).eval().to(dtype)
    packed = deepcopy(plain)
    prepare_convolutions(packed, pack=True)
    kinds = {type(module) for module in packed.modules()}
    assert {PackedConvolution, PackedResBlock, MergedUpsample} < kinds
    assert not {nn.Conv2d, ResBlock} & kinds
    # Weights that were packed for the first size serve others.
    for batch, side in ((2, 16), (1, 16), (3, 8)):
        images = torch.rand(batch, 3, side, side, dtype=dtype)
        tokens = torch.randint(64, (batch, side // 2, side // 2))
        for theirs, own in (
            (plain.encoder(images), packed.encoder(images)),
            (plain.decode(tokens), packed.decode(tokens)),
        ):
            scale = theirs.float().std()
            assert (own.float() - theirs.float()).abs().max() < scale * (5e-5 if dtype.itemsize == 4 else 0.1)


def test_prepared_convolutions_keep_their_names_where_they_can(tiny):
    tokenizer = deepcopy(tiny.tokenizer)
    prepare_convolutions(tokenizer, pack=False)
    names = {name for name, _ in tokenizer.named_parameters()}
    gone = {name for name, _ in tiny.tokenizer.named_parameters()} - names
    assert gone
    assert all(".ups." in name for name in gone)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_integer_arithmetic(bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias)
    rows = torch.randn(3, 5, 96) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    rows[1, 2] = 0
    quantized = Int8Linear(layer)
    weight_scale = layer.weight.abs().amax(1) / 127
    weights = (layer.weight / weight_scale[:, None]).round().double()
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / quantized.largest
    exact = (rows / scale).round().double() @ weights.T * weight_scale * scale
    exact = exact + layer.bias if bias else exact
    torch.testing.assert_close(quantized(rows).double(), exact, atol=1e-4, rtol=1e-5)


def test_int8_is_not_left_to_plain_loops(capfd):
    if not adds_in_32_bits():
        pytest.skip("this CPU has no VNNI")
    layer = Int8Linear(nn.Linear(64, 64).requires_grad_(False))
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        layer(torch.randn(3, 64))
    # oneDNN prints by way of C, which keeps lines back.
    ctypes.CDLL(None).fflush(None)
    products = [line for line in capfd.readouterr().out.splitlines() if ",exec,cpu,matmul," in line]
    assert products
    assert not [line for line in products if ",ref" in line]


@torch.no_grad()
def test_mkl_packs_for_the_last_two_numbers_of_rows():
    if "mkl" not in ways(torch.float32):
        pytest.skip("this build of torch has no MKL")
    layer = nn.Linear(48, 32)
    packed = MklLinear.of(layer)
    for rows in (3, 5, 3, 7, 9):
        x = torch.randn(rows, 2, 48)
        torch.testing.assert_close(packed(x), layer(x))
    assert list(packed.packs) == [14, 18]
    assert packed.weight is layer.weight


def test_replacing_reaches_every_linear_layer(tiny):
    from copy import deepcopy

    transformer = deepcopy(tiny.transformer)
    count = sum(isinstance(m, nn.Linear) for m in transformer.modules())
    replace_linears(transformer, "int8")
    assert sum(isinstance(m, Int8Linear) for m in transformer.modules()) == count


def test_the_host_is_asked_politely(tmp_path, monkeypatch):
    assert keep_freed_memory() in (True, False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(host, "CPU_QUOTA", quota)
    assert cpu_quota() is None
    for text, found in (("max 100000", None), ("150000 100000", 1.5), ("rubbish", None)):
        quota.write_text(text)
        assert cpu_quota() == found
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        quota.write_text("100000 100000")
        assert host.limit_threads() == 1
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert host.limit_threads() == before


# All others go the ways of a CPU that hides nothing.
LESS = [
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
]


@pytest.mark.parametrize("limits", LESS, ids=lambda limits: limits["ONEDNN_MAX_CPU_ISA"])
def test_a_cpu_with_fewer_instructions_goes_every_way_that_is_left(limits):
    code = (
        "import torch\n"
        "from maskgit import MaskGIT\n"
        "from maskgit.engine import alternatives, build\n"
        "from maskgit.engine.host import has_bfloat16_units\n"
        "from maskgit.engine.layers import PATHS\n"
        "model = MaskGIT.from_pretrained()\n"
        "found = alternatives('fast', device='cpu')\n"
        "for engine in found:\n"
        "    made = build(model, engine).generate('frog', steps=1)\n"
        "    assert made.images.isfinite().all(), engine\n"
        "weight, rows = torch.full((48, 96), 0.5), torch.full((3, 96), 2.0)\n"
        "layer = torch.nn.Linear(96, 48, bias=False)\n"
        "layer.weight.data = weight\n"
        "made = PATHS['int8'][1](layer)(rows)\n"
        "assert torch.allclose(made, rows @ weight.T), made\n"
        "print(*(f'{e.dtype}/{e.linear}' for e in found), has_bfloat16_units())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | limits, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *found, units = done.stdout.split()
    assert {"float32/torch", "bfloat16/torch"} <= set(found)
    # Where oneDNN has no bfloat16, no units of the CPU are of use.
    assert units == "False" or "bfloat16/onednn" in found


def test_whether_a_cpu_has_bfloat16_is_asked_in_one_place(monkeypatch):
    from maskgit.engine.host import has_bfloat16_units
    from maskgit.training.numerics import choose_precision

    monkeypatch.setattr(host, "ways", lambda dtype: ("torch", "onednn"))
    # What the versions of torch tell, and what none tells.
    for said, private, expected in (
        ({"avx512_bf16": True}, None, True),
        ({"avx512_bf16": False}, lambda: True, False),
        (None, lambda: True, True),
        (None, lambda: False, False),
        ({"architecture": "x86_64"}, lambda: True, True),
        (None, None, False),
    ):
        for name, value in (
            ("get_capabilities", None if said is None else lambda said=said: said),
            ("_is_avx512_bf16_supported", private),
        ):
            if value is None:
                monkeypatch.delattr(torch.cpu, name, raising=False)
            else:
                monkeypatch.setattr(torch.cpu, name, value, raising=False)
        assert has_bfloat16_units() is expected
        wanted = torch.bfloat16 if expected else torch.float32
        assert choose_precision("auto", torch.device("cpu")) == wanted
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(host, "ways", lambda dtype: ("torch",))
    assert not has_bfloat16_units()
