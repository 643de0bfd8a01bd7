"""Reused context against full evaluations, row by row."""

import pytest
import torch
from torch import nn

from maskgit import MaskGIT
from maskgit.engine import Engine, choose
from maskgit.engine.batching import Batcher
from maskgit.engine.linear import ways
from maskgit.engine.reuse import LARGEST_SHARE, ContextReuse
from maskgit.errors import ConfigError
from maskgit.sampler.policies import POLICIES
from ties import assert_same_tokens


@pytest.fixture(scope="module")
def bundled():
    return MaskGIT.from_pretrained()


@pytest.fixture(scope="module")
def sequence(bundled):
    """Three rows of a generation, of which 40 tokens are known."""
    made = bundled.generate(["frog", "ship", None], seed=3, steps=4).tokens.flatten(1)
    sequence = bundled.vocabulary.sequence(torch.tensor([6, 8, -1]))
    sequence[:, 10:50] = made[:, 9:49]
    return sequence


def predictor(model, reuse=100) -> ContextReuse:
    return ContextReuse(
        model.transformer,
        model.local_transformer,
        codes=model.vocabulary.num_codes,
        mask_token=model.vocabulary.mask,
        reuse=reuse,
    )


class Counted:
    """Counts the rows that go through every linear layer of a transformer's layers."""

    def __init__(self, model) -> None:
        self.rows: list[int] = []
        self.hooks = [
            module.register_forward_pre_hook(lambda _, args: self.rows.append(args[0].shape[:-1].numel()))
            for layer in model.transformer.layers
            for module in layer.modules()
            if isinstance(module, nn.Linear)
        ]

    def take(self) -> int:
        """Return the rows of each layer since the last time, which must be as many in all."""
        (rows,) = set(self.rows)
        self.rows.clear()
        return rows


@pytest.fixture
def counted(bundled):
    counted = Counted(bundled)
    yield counted
    for hook in counted.hooks:
        hook.remove()


def near(made, expected):
    torch.testing.assert_close(made, expected, atol=2e-4, rtol=1e-4)


def test_the_first_evaluation_is_full(bundled, sequence):
    assert torch.equal(predictor(bundled)(sequence), bundled.predict_logits(sequence))


def test_the_same_sequence_again_is_the_full_evaluation_from_fewer_rows(bundled, sequence, counted):
    predict = predictor(bundled)
    full = predict(sequence)
    assert counted.take() == 3 * 65
    again = predict(sequence)
    # The class, and what is masked.
    assert counted.take() == 3 * 25
    near(again, full)
    assert torch.equal(again[:, 10:50], full[:, 10:50])


def test_known_tokens_keep_their_logits_and_new_ones_are_computed(bundled, sequence, counted):
    predict = predictor(bundled)
    full = predict(sequence)
    kept = full.clone()
    counted.take()
    changed = sequence.clone()
    changed[:, 1:6] = 7
    local = predict(changed)
    assert counted.take() == 3 * 25
    assert torch.equal(full, kept)
    assert torch.equal(local[:, 10:50], full[:, 10:50])
    # The new tokens were computed and are not masked any more.
    predict(changed)
    assert counted.take() == 3 * 20
    # What others see of the new tokens is what they are, so most of what that changes is there.
    expected = bundled.predict_logits(changed)
    rest = slice(50, 65)
    assert (local - expected)[:, rest].std() < 0.6 * (full - expected)[:, rest].std()


def test_when_every_token_has_changed_it_is_the_full_evaluation(bundled, sequence):
    predict = predictor(bundled)
    predict(sequence)
    changed = sequence.roll(1, 0)
    changed[:, 1:] = (changed[:, 1:] + 1) % 512
    assert torch.equal(predict(changed), bundled.predict_logits(changed))


def test_what_is_masked_again_is_computed_again(bundled, sequence):
    predict = predictor(bundled)
    full = predict(sequence)
    masked = sequence.clone()
    masked[:, 10:14] = bundled.vocabulary.mask
    predict(masked)
    # Back to where it was: what was kept meanwhile of the masked tokens must not be seen.
    near(predict(sequence)[:, 1:10], full[:, 1:10])


def test_of_so_many_evaluations_one_is_full(bundled, sequence, counted):
    predict = predictor(bundled, reuse=3)
    rows = []
    for _ in range(7):
        predict(sequence)
        rows.append(counted.take() // 3)
    assert rows == [65, 25, 25, 65, 25, 25, 65]


def test_where_little_is_known_or_the_batch_is_another_evaluation_is_full(bundled, sequence, counted):
    predict = predictor(bundled)
    for rows in (3, 2):
        assert torch.equal(predict(sequence[:rows]), bundled.predict_logits(sequence[:rows]))
    counted.rows.clear()
    few = sequence[:2].clone()
    few[:, 1 + int((1 - LARGEST_SHARE) * 65) :] = bundled.vocabulary.mask
    predict(few)
    assert counted.take() == 2 * 65


def test_rows_do_not_depend_on_their_companions(bundled, sequence, counted):
    # The second row is evaluated in full where the first is not; the third has less to compute than both.
    steps = [sequence.clone() for _ in range(3)]
    steps[1][1, 12:] = steps[2][1, 12:] = bundled.vocabulary.mask
    steps[1][2, 50:60] = steps[2][2, 50:60] = 5
    together, alone = predictor(bundled), [predictor(bundled) for _ in range(3)]
    for number, step in enumerate(steps):
        made = together(step)
        counted.rows.clear()
        for row in range(3):
            near(made[row], alone[row](step[row : row + 1])[0])
            if number == 2:
                assert counted.take() == (25, 65, 15)[row]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_whole_images_near_the_exact_ones(bundled, policy, float32):
    settings = {"steps": 5, "policy": policy, "seed": 5, "temperature": 0.0, "choice_temperature": 0.0}
    exact = bundled.generate(["frog", "ship"], **settings)
    full = bundled.optimize(**float32, reuse=1).generate(["frog", "ship"], **settings)
    assert_same_tokens(full.tokens, exact.tokens)
    made = bundled.optimize(**float32, reuse=2).generate(["frog", "ship"], **settings)
    assert made.tokens.max() < 512
    assert (made.tokens == exact.tokens).float().mean() > 0.3


def test_the_bundled_model_stays_near_and_images_are_independent(bundled, float32):
    asked = {"num_images": 3, "seed": 4}
    model = bundled.optimize(**float32, reuse=2)
    assert model.engine.reuse == 2
    whole = model.generate(["frog", "ship"], **asked).tokens
    assert torch.equal(model.generate(["frog", "ship"], batch_size=1, **asked).tokens, whole)
    exact = bundled.generate(["frog", "ship"], **asked).tokens
    assert 0.6 < (whole == exact).float().mean() < 1


def test_it_goes_with_every_form(bundled, sequence, form):
    model = bundled.optimize(**form, reuse=2)
    predict = model.new_predictor()
    assert torch.equal(predict(sequence), model.predict_logits(sequence))
    again, full = predict(sequence).float(), bundled.predict_logits(sequence)
    assert (again - full).std() < 0.05 * full.std()
    assert model.generate("frog", steps=3).tokens.shape == (1, 8, 8)


def test_weights_packed_for_full_evaluations_stay_packed(bundled):
    if "mkl" not in ways(torch.float32):
        pytest.skip("this build of torch has no MKL")
    model = bundled.optimize("exact", linear="mkl", reuse=3)
    model.generate("frog", steps=6)
    # Of a guided image and its copy without a class; local evaluations pack nothing, and share the weights.
    layer, local = model.transformer.layers[0].mlp.up, model.local_transformer.layers[0].mlp.up
    assert list(layer.packs) == [2 * 65]
    assert type(local) is nn.Linear
    assert local.weight.data_ptr() == layer.weight.data_ptr()


def test_what_does_not_go_is_refused(bundled):
    for nonsense in (0, -1, 257, 1.5, "2"):
        with pytest.raises(ConfigError, match="reuse"):
            bundled.optimize("exact", reuse=nonsense)
    with pytest.raises(ConfigError, match="CUDA graphs repeat the same work"):
        Engine(device="cuda", graphs=True, reuse=2)
    assert not choose("fast", device=torch.device("cuda"), dtype="bfloat16", reuse=2).graphs
    with pytest.raises(ConfigError, match="leave reuse at 1"):
        Batcher(bundled.optimize("exact", linear="torch", reuse=2), max_batch=1)
