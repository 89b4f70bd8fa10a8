"""The span-level loss against its definition in float64, against autograd, and its spans against texts read by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compress.errors import DependencyError, UsageError
from compress.losses import Outputs, Setting, base, loss_options, make_loss
from compress.losses.spans import ChunkSpans, EnglishPhrases, FixedSpans, PunctuationSpans, SpanCorrelation, phrases


def definition(student: Tensor, teacher: Tensor, spans: Tensor, power: float = 1.0, temperature: float = 1.0) -> Tensor:
    """The value of each pair of neighbours of one span, pair by pair in float64."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    found = [
        (((q[b, t] * q[b, t + 1]) ** power - (p[b, t] * p[b, t + 1]) ** power) ** 2).sum()
        for b in range(len(spans))
        for t in range(spans.shape[1] - 1)
        if spans[b, t] == spans[b, t + 1] and spans[b, t] >= 0
    ]
    return torch.stack(found)


def example(seed: int = 0, classes: int = 7, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher [3, 9, classes] and spans: of 1, 2, 3 and 4 tokens, gaps, and neighbours of other numbers."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 3, 9, classes, generator=generator, dtype=torch.float64)
    spans = torch.tensor(
        [[0, 0, 1, 1, 1, -1, -1, 4, 4], [-1, 2, 2, 2, 2, 3, 4, 4, -1], [-1, 0, -1, 0, -1, 1, 2, 3, -1]]
    )
    return student, teacher, spans


@pytest.mark.parametrize("pairing", ["hadamard", "geometric"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradient_are_those_of_the_definition(pairing: str, temperature: float) -> None:
    student, teacher, spans = example(scale=2.0)
    student.requires_grad_()
    power = {"hadamard": 1.0, "geometric": 0.5}[pairing]
    loss = SpanCorrelation(pairing=pairing, temperature=temperature, reduction="none")
    upstream = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, want = loss(student, teacher, spans=spans), definition(student, teacher, spans, power, temperature)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(got, student, upstream)
    (true,) = torch.autograd.grad(want, student, upstream)
    assert torch.allclose(gradient, true, rtol=0, atol=1e-15)
    assert not gradient[2].any()  # that row has no pair


@pytest.mark.parametrize("pairing", ["hadamard", "geometric"])
def test_gradcheck_with_masks_and_weights(pairing: str) -> None:
    student, teacher, spans = example()
    student.requires_grad_()
    labels = torch.zeros(3, 9, dtype=torch.int64)
    labels[0, 3] = -100
    weights = torch.rand(3, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[1, 4] = 0
    for reduction in ("mean", "sum", "none"):
        loss = SpanCorrelation(pairing=pairing, temperature=1.7, reduction=reduction)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights, spans=spans), (student,))


def test_a_pair_counts_when_both_positions_do() -> None:
    student, teacher, spans = example()
    labels, weights = torch.zeros(3, 9, dtype=torch.int64), torch.ones(3, 9, dtype=torch.float64)
    labels[0, 3], weights[1, 4], weights[1, 1] = -100, 0, 3
    left = spans.clone()
    left[0, 3] = left[1, 4] = -1
    values = definition(student, teacher, left)
    pair_weights = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # (0,0) (0,7) (1,1) (1,2) (1,6)
    assert len(values) == len(pair_weights)
    for reduction, want in (
        ("none", values * pair_weights),
        ("sum", (values * pair_weights).sum()),
        ("mean", (values * pair_weights).sum() / pair_weights.sum()),
    ):
        got = SpanCorrelation(reduction=reduction)(student, teacher, labels, weights, spans=spans)
        assert torch.allclose(got, want, rtol=1e-12)
    with_denominator = SpanCorrelation()(student, teacher, labels, weights, 10.0, spans=spans)
    assert torch.allclose(with_denominator, (values * pair_weights).sum() / 10)


def test_closed_forms() -> None:
    one_hot = torch.full((1, 2, 3), -1e4)
    one_hot[0, :, 0] = 1e4
    other = one_hot.roll(1, -1)
    spans = torch.zeros(1, 2, dtype=torch.int64)
    some, teacher = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for pairing in ("hadamard", "geometric"):
        loss = SpanCorrelation(pairing=pairing)
        exchanged = loss(some.flip(1), teacher, spans=spans)  # the product does not see which of the two is which
        assert torch.allclose(exchanged, loss(some, teacher, spans=spans), rtol=1e-12)
        assert loss(other, one_hot, spans=spans).item() == 2.0  # the largest value that there is
        assert loss(one_hot, one_hot, spans=spans).item() == 0.0
        flat = loss(torch.zeros(1, 2, 3), one_hot, spans=spans).item()
        root = 1 / 9 if pairing == "hadamard" else 1 / 3
        assert flat == pytest.approx((1 - root) ** 2 + 2 * root**2, rel=1e-6)


def test_extreme_logits() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = 1e4 * torch.randn(2, 2, 5, 6, generator=generator)
    student[..., 2], teacher[..., 2] = -math.inf, -math.inf
    student[0, 1, 4], teacher[0, 2, 4] = -math.inf, -math.inf  # neighbours: each left out by one model alone
    student.requires_grad_()
    loss = SpanCorrelation(reduction="none")(student, teacher, spans=torch.zeros(2, 5, dtype=torch.int64))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.allclose(loss.double(), definition(student, teacher, torch.zeros(2, 5, dtype=torch.int64)), atol=1e-7)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(("distance", "bound"), [(1e-1, 5e-5), (1e-2, 1e-3), (1e-3, 5e-3)])
def test_float32_against_float64(distance: float, bound: float) -> None:
    generator = torch.Generator().manual_seed(4)
    teacher = 3 * torch.randn(2, 8, 4000, generator=generator)
    student = teacher + distance * torch.randn(teacher.shape, generator=generator)
    spans = torch.zeros(2, 8, dtype=torch.int64)
    got = SpanCorrelation(reduction="none")(student, teacher, spans=spans)
    assert got.dtype == torch.float32
    assert (got.double() / definition(student, teacher, spans) - 1).abs().max() < bound


def test_half_precision_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(2, 2, 8, 500, generator=generator)).bfloat16()
    spans = torch.zeros(2, 8, dtype=torch.int64)
    got = SpanCorrelation(reduction="none")(student, teacher, spans=spans)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), definition(student, teacher, spans), rtol=1e-5)


def test_the_size_of_chunks_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, spans = example(classes=50)
    results = []
    for rows in (1, 2, 3, 100):
        monkeypatch.setattr(base, "CPU_VALUES", 50 * rows)
        leaf = student.float().requires_grad_()
        loss = SpanCorrelation()(leaf, teacher.float(), spans=spans)
        loss.backward()
        results.append((loss.item(), leaf.grad))
    for value, gradient in results[1:]:
        assert value == results[0][0]
        assert torch.equal(gradient, results[0][1])


def test_only_logits_are_kept_for_the_backward_pass() -> None:
    student, teacher, spans = example()
    student.requires_grad_()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        SpanCorrelation()(student, teacher, spans=spans)
    whole = {tensor.data_ptr() for tensor in kept if tensor.numel() >= student.numel()}
    assert whole == {student.data_ptr(), teacher.data_ptr()}


def test_no_pair_gives_a_connected_zero() -> None:
    student = torch.randn(2, 3, 5)
    student[0, 0, 0] = -math.inf
    student.requires_grad_()
    alone = torch.tensor([[0, 1, 2], [-1, -1, -1]])
    loss = SpanCorrelation()(student, torch.randn(2, 3, 5), spans=alone)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()
    assert SpanCorrelation(reduction="none")(student, torch.randn(2, 3, 5), spans=alone).shape == (0,)


def test_vocabularies_of_other_sizes() -> None:
    student, teacher, spans = example()
    wide = torch.cat([teacher, torch.randn(3, 9, 2, dtype=torch.float64)], -1)
    got = SpanCorrelation(vocabulary="common")(student, wide, spans=spans)
    assert torch.equal(got, SpanCorrelation()(student, teacher, spans=spans))
    with pytest.raises(UsageError, match=r"\(3, 9, 7\), the teacher's \(3, 9, 9\)"):
        SpanCorrelation()(student, wide, spans=spans)


def test_a_trainer_pairs_the_predicted_tokens() -> None:
    """Tokens 0..8 are read, the label of the last position is 9; spans of three are (0 1 2) (3 4 5) (6 7 8) (9 ...).
    Position t predicts t + 1, so the pairs of positions are (0 1), (2 3), (3 4), (5 6), (6 7), and not (0 1), (1 2)."""
    student, teacher, _ = example()
    tokens = torch.arange(9).expand(3, 9)
    outputs = Outputs(student, teacher, labels=tokens + 1, tokens=tokens)
    predicted = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3]).expand(3, 9)
    want = definition(student, teacher, predicted).mean()
    loss = SpanCorrelation(length=3)
    assert torch.equal(loss.spans(outputs), predicted)
    assert torch.allclose(loss.of(outputs), want)
    assert torch.allclose(loss.of(outputs, denominator=2 * 27), want / 2)
    weights = torch.ones(3, 9, dtype=torch.float64)
    weights[:, 8] = 5  # of a position without a pair
    weighed = Outputs(student, teacher, labels=tokens + 1, weights=weights, tokens=tokens)
    assert torch.allclose(loss.of(weighed, denominator=78), want / 2)  # all weights are 3 (8 + 5) = 39
    masked = tokens + 1
    masked[:, -1] = -100
    assert loss.spans(Outputs(student, teacher, labels=masked, tokens=tokens))[:, -1].eq(-1).all()
    assert loss.spans(Outputs(student, teacher, tokens=tokens))[:, -1].eq(-1).all()
    want = definition(student[:, :-1], teacher[:, :-1], predicted[:, :-1]).mean()
    assert torch.allclose(loss.of(Outputs(student, teacher, labels=masked, tokens=tokens), 48), want / 2)


class Words:
    """A tokenizer by hand: the numbers of some pieces, and `pieces`."""

    def __init__(self, *texts: str) -> None:
        self.texts = sorted(set(texts))

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        return [self.texts[token] for token in tokens]

    def ids(self, *texts: str) -> Tensor:
        return torch.tensor([[self.texts.index(text) for text in texts]])


def test_fixed_spans() -> None:
    tokens = torch.tensor([[5, 5, 5, 5, 5, 5], [5, 5, -1, 5, -1, -1]])
    assert FixedSpans(4)(tokens).tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, -1, 0, -1, -1]]


def test_punctuation_ends_a_span() -> None:
    spans = [
        ["Don", "'t", " go", ","],
        [" well", "-", "known", " man", ":\n"],
        ["  ", "x", "_y", " ("],
        ["z", ")"],
        [" a\n  "],
        [" \u00e9\u2026"],
    ]
    row = [piece for span in spans for piece in span]
    words = Words(*row)
    tokens = words.ids(*row)
    assert PunctuationSpans(words)(tokens).tolist() == [[n for n, span in enumerate(spans) for _ in span]]
    tokens[0, 2] = -1
    got = PunctuationSpans(words)(tokens).tolist()[0]
    assert got[2] == -1
    assert got[1] < got[3]  # a token that is missing divides


def test_a_piece_belongs_to_the_phrase_of_its_word() -> None:
    def stand_in(text: str) -> list[tuple[int, int]]:
        """The phrases of the sentence below, by hand."""
        assert text == "The wooden bench did not break at noon in the  park."
        return [match.span() for match in re.finditer("The wooden bench|did not break|in the  park", text)]

    pieces = {
        "The": 0, " wood": 0, "en": 0, " ben": 0, "ch": 0,
        " did": 1, " not": 1, " break": 1,
        "": -1, " at": -1, " noon": -1,
        " in": 2, " the": 2, "  ": -1, "park": 2,
        ".": -1,
    }  # fmt: skip
    words = Words(*pieces)
    tokens = torch.cat([words.ids(*pieces), torch.full((1, 2), -1)], 1)
    assert ChunkSpans(words, stand_in)(tokens).tolist() == [[*pieces.values(), -1, -1]]


def test_runs_of_words() -> None:
    text = "It isn't well-known, or\nis it? caf\ufffd \ufffdtwo"
    runs = [[text[start:end] for start, end in run] for run in phrases.word_runs(text)]
    assert runs == [["It", "isn't", "well-known"], ["or"], ["is", "it"], ["caf\ufffd", "\ufffdtwo"]]


def test_english_phrases() -> None:
    pytest.importorskip("textblob")
    text = "The old man sat on a wooden bench, and he had never seen the sea.\nMary\u2019s dog 's"
    found = [text[start:end] for start, end in EnglishPhrases()(text)]
    assert found[:3] == ["The old man", "sat", "on a wooden bench"]
    assert found[3:6] == ["he", "had never seen", "the sea"]
    assert found[6].startswith("Mary\u2019s dog")
    assert EnglishPhrases()(" ...\n") == []


def test_a_missing_chunker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(phrases, "import_module", missing)
    with pytest.raises(DependencyError, match=r"'textblob' is not installed.*model-compress\[spans\]"):
        SpanCorrelation(source="chunks", pieces=lambda tokens: [""] * len(tokens))


def test_by_name() -> None:
    setting = Setting(classes=7, student_width=1, pieces=lambda tokens: ["a."] * len(tokens))
    loss = make_loss("span", {"source": "punctuation"}, setting)
    assert isinstance(loss, SpanCorrelation)
    assert loss.source(torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[0, 1, 2]]
    assert loss_options("span") == {"source": "fixed", "length": 4, "pairing": "hadamard", "temperature": 1.0}


def test_mistakes_are_named() -> None:
    student, teacher, spans = example()
    with pytest.raises(UsageError, match=r"source 'punctuation' looks at the text.*Give pieces"):
        SpanCorrelation(source="punctuation")
    with pytest.raises(UsageError, match="no source 'words'"):
        SpanCorrelation(source="words")
    with pytest.raises(UsageError, match="no pairing 'dot'"):
        SpanCorrelation(pairing="dot")
    with pytest.raises(UsageError, match="length is 0"):
        SpanCorrelation(length=0)
    with pytest.raises(UsageError, match="needs spans"):
        SpanCorrelation()(student, teacher)
    with pytest.raises(UsageError, match="needs the teacher's logits"):
        SpanCorrelation()(student, spans=spans)
    with pytest.raises(UsageError, match=r"\(9, 7\); neighbours are only known of rows"):
        SpanCorrelation()(student[0], teacher[0], spans=spans[0])
    with pytest.raises(UsageError, match=r"The spans are \(3, 8\)"):
        SpanCorrelation()(student, teacher, spans=spans[:, 1:])
    with pytest.raises(UsageError, match="found by its tokens"):
        SpanCorrelation().of(Outputs(student, teacher))
