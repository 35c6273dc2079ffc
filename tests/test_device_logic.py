"""Device code of variants, compiled for the host with stand-ins for CUDA (host_headers): hooks and
what stands around them (attention/variant) beside their forms for the CPU, softcap, and statistics
that threads read (attention/backward). Nothing here needs a GPU."""

import math
import random
from pathlib import Path

import pytest
import torch
from host_program import CHECKED, host_program, needs_cxx
from variant_cases import CASES, Case

from cute_kernels import Variant
from cute_kernels.compile.hooks import hooks_source
from cute_kernels.variants.checks import Sizes, expanded, with_gradient

pytestmark = needs_cxx

SCALE = 0.75
MASKED = -1e30  # a score of -inf, to the program
SIZES = Sizes(2, 4, 13, 17, 60, 70)
# Slopes that are infinite where the hooks are asked about 0, and weights that are NaN where a
# query sees nothing.
ROOTED = Variant(
    "rooted",
    score="auto const x = score * gain[head];\nreturn x > 0.f ? sqrt(x) : -sqrt(-x);",
    mask="return key <= position;",
    score_python=lambda score, head, gain: (
        (score * gain[head]).abs().sqrt() * (score * gain[head]).sign()
    ),
    mask_python=lambda key, position: key <= position,
    tensors={"gain": ("float16", "head")},
)
WEIGHED = Variant(
    "weighed",
    mask="return key <= position;",
    weight="return weights[query][key];",
    mask_python=lambda key, position: key <= position,
    weight_python=lambda query, key, weights: weights[query, key],
    tensors={"weights": ("float32", "query", "key")},
)
# The other axes and dtypes, and every function, of which dual numbers have derivatives.
EVERY = Variant(
    "every",
    score="auto const x = score + of_rows[query_row][key_row] * (flags[batch] ? 0.5f : 0.25f);\n"
    "auto y = exp(-abs(x)) + log(2.f + x * x) / log2(3.f + exp2(min(x, 4.f)));\n"
    "y += sin(x) * cos(x) - rsqrt(1.f + x * x);\n"
    "y *= 1.f + sigmoid(max(x, -2.f)) / (2.f - tanh(x));\n"
    "return y - bytes[key - position + 3] * 0.125f;",
    score_python=lambda score, batch, query_row, key_row, key, position, of_rows, flags, bytes: (
        _every(score + of_rows[query_row, key_row] * torch.where(flags[batch], 0.5, 0.25))
        - bytes[(key - position + 3).clamp(0, 6)] * 0.125
    ),
    tensors={
        "of_rows": ("bfloat16", "query_row", "key_row"),
        "flags": ("bool", "batch"),
        "bytes": ("int8", 7),
    },
)
MAIN = """
#include <cstring>
#include <iostream>
#include <memory>
#include <vector>
#include "cute_kernels/attention/variant/captured.hpp"
#include "cute_kernels/attention/variant/math.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
using namespace cute_kernels::attention;

%s
struct One {
  float value;
  float& operator()(int, int) { return value; }
};

// What kernels do with a block of one score.
template <class Variant, class Params, class PlaceOf>
float hidden_or(float value, Params const& params, PlaceOf const& place) {
  One score{value};
  auto const shown = shown_elements<Variant>(params, score, [&] { return place; }, false);
  shown.hide_others(score, Variant::kHidden);
  return score.value;
}

template <class Hooks>
void ask() {
  using Variant = HookedVariant<Hooks>;
  struct {
    VariantArguments variant;
  } params{};
  VariantArguments& variant = params.variant;
  int tensors, numbers, places;
  std::cin >> variant.scale >> variant.most_queries >> variant.most_keys >> tensors >> numbers >>
      places;
  std::vector<std::unique_ptr<unsigned char[]>> memory(tensors);
  for (int i = 0; i < tensors; ++i) {
    int axes, bytes;
    std::cin >> axes;
    for (int axis = 0; axis < axes; ++axis) {
      std::cin >> variant.tensors[i].sizes[axis] >> variant.tensors[i].strides[axis];
    }
    std::cin >> bytes;
    memory[i].reset(new unsigned char[bytes]);
    for (int byte = 0, value; byte < bytes; ++byte) {
      std::cin >> value;
      memory[i][byte] = static_cast<unsigned char>(value);
    }
    variant.tensors[i].data = memory[i].get();
  }
  for (int i = 0; i < numbers; ++i) {
    std::cin >> variant.numbers[i].as_float;
    variant.numbers[i].as_int = static_cast<int>(variant.numbers[i].as_float);
  }
  for (; places > 0; --places) {
    int batch, head, query, key;
    Sequence sequence{};
    float score;
    std::cin >> batch >> head >> query >> key >> sequence.row_q >> sequence.row_k >>
        sequence.seqlen_q >> sequence.seqlen_k >> score;
    if (score <= %s) score = -INFINITY;  // which streams do not read
    SequencePlace const in_sequence(variant, batch, head, sequence);
    auto const place = [&](int, int) { return in_sequence.template at<Variant>(query, key); };
    One forward{score}, weighed{1.f}, unseen{0.f};
    if constexpr (Variant::kScores) Variant::change(params, forward, place);
    forward.value = hidden_or<Variant>(forward.value, params, place);
    if constexpr (Variant::kWeighs) {
      Variant::weigh(params, weighed, place);
      Variant::weigh(params, unseen, place);
    }
    float const seen = hidden_or<Variant>(score, params, place);
    auto const changed = Variant::element(params, seen, seen == Variant::kHidden, place(0, 0));
    std::cout << forward.value << ' ' << weighed.value << ' ' << unseen.value << ' '
              << changed.value << ' ' << changed.hidden << ' ' << changed.times(1.f, changed.slope)
              << ' ' << changed.times(1.f, changed.weight);
    for (int i = 0; i < Variant::kGradients; ++i) {
      std::cout << ' ' << changed.times(1.f, changed.slopes[i]);
    }
    std::cout << '\\n';
  }
}

int main(int, char** arguments) {
  std::cout.precision(9);
  void (*const asks[])() = {%s};
  asks[std::atoi(arguments[1])]();
}
"""


def _every(x):
    y = (-x.abs()).exp() + (2 + x * x).log() / (3 + x.clamp(max=4).exp2()).log2()
    y = y + x.sin() * x.cos() - (1 + x * x).rsqrt()
    return y * (1 + x.clamp(min=-2).sigmoid() / (2 - x.tanh()))


def rooted(chance, device, batch, heads, seqlen_q, seqlen_k):
    gain = (torch.rand(heads) + 0.5).half().requires_grad_()
    return Case(ROOTED(gain=gain), None, {"gain": gain})


def weighed(chance, device, batch, heads, seqlen_q, seqlen_k):
    hidden = torch.ones(seqlen_q, seqlen_k).triu(seqlen_k - seqlen_q + 1).bool()
    weights = torch.rand(seqlen_k, seqlen_q).T.masked_fill(hidden, math.nan)
    return Case(WEIGHED(weights=weights), None, {})


def every(chance, device, batch, heads, seqlen_q, seqlen_k):
    of_rows = torch.randn(SIZES.query_row, 2 * SIZES.key_row).bfloat16()[:, ::2]
    flags = torch.tensor([True, False])
    return Case(
        EVERY(of_rows=of_rows, flags=flags, bytes=torch.randint(-99, 99, (7,)).char()), None, {}
    )


MADE = {}
for name, make in {**CASES, "rooted": rooted, "weighed": weighed, "every": every}.items():
    torch.manual_seed(len(MADE))
    MADE[name] = make(random.Random(name), "cpu", *SIZES[:4]).bound


def device_program(folder, source, *options):
    headers = str(Path(__file__).parent / "host_headers")
    options = ("-I", headers, "-fno-strict-aliasing", *CHECKED, *options)
    return host_program(folder, source, *options)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Answers of a case about places, (batch, head, query, key, row_q, row_k, seqlen_q, seqlen_k,
    score): forward's score, the weights of a P of 1 and of 0, and all of ChangedScore."""
    sources = [
        f"namespace cute_kernels::attention::{name}_ {{\nusing namespace hook_math;\n"
        f"{hooks_source(bound.variant.hooks, with_gradient(bound))}}}\n"
        for name, bound in MADE.items()
    ]
    source = MAIN % ("\n".join(sources), MASKED, ", ".join(f"ask<{name}_::Hooks>" for name in MADE))
    program = device_program(tmp_path_factory.mktemp("hooks"), source)

    def run(name, places, most_queries=SIZES.query, most_keys=SIZES.key):
        bound = MADE[name]
        sizes = SIZES._replace(query=most_queries, key=most_keys)
        tensors = expanded(bound, sizes)
        head = [SCALE, most_queries, most_keys, len(tensors), len(bound.numbers), len(places)]
        lines = [head]
        for tensor in tensors:
            last = sum(
                (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            data = tensor.detach().as_strided((last + 1,), (1,)).view(torch.uint8).tolist()
            layout = [x for pair in zip(tensor.shape, tensor.stride(), strict=True) for x in pair]
            lines.append([tensor.dim(), *layout, len(data), *data])
        lines += [list(bound.numbers), *places]
        return torch.tensor(program(lines, str(list(MADE).index(name)), number=float)).double()

    return run


def random_places(chance, count, beyond=0):
    """Of calls of any lengths up to SIZES, with queries and keys before and behind a sequence's."""
    places = []
    for _ in range(count):
        seqlen_q, seqlen_k = chance.randint(1, SIZES.query), chance.randint(1, SIZES.key)
        query = chance.randint(-beyond, seqlen_q - 1 + beyond)
        key = chance.randint(0, seqlen_k - 1 + beyond)
        rows = (
            chance.randint(0, SIZES.query_row - seqlen_q),
            chance.randint(0, SIZES.key_row - seqlen_k),
        )
        of = chance.randrange(SIZES.batch), chance.randrange(SIZES.head)
        places.append((*of, query, key, *rows, seqlen_q, seqlen_k, chance.gauss(0, 4)))
    return places


def expected(name, places):
    """The same by the forms for the CPU in fp64: the changed score, whether the place is hidden,
    the weight, the slopes with respect to the score and to captured tensors."""
    bound = MADE[name]
    python = bound.variant.python
    batch, head, query, key, row_q, row_k, seqlen_q, seqlen_k, score = map(
        torch.tensor, zip(*places, strict=True)
    )
    tensors = expanded(bound, SIZES)
    captured = dict(zip(bound.captured(), [*tensors, *bound.numbers], strict=True))
    captured = {
        n: x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for n, x in captured.items()
    }
    names = {
        **{"batch": batch, "head": head, "query": query, "key": key},
        **{"query_row": query + row_q, "key_row": key + row_k},
        **{"position": query + seqlen_k - seqlen_q, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k},
        **captured,
    }

    def call(hook, **values):
        code = python[hook].__code__
        return python[hook](
            **{n: {**names, **values}[n] for n in code.co_varnames[: code.co_argcount]}
        )

    scaled = score.double() * SCALE
    seen = torch.ones(len(places), dtype=torch.bool) if python["mask"] is None else call("mask")
    weight = (
        torch.ones(len(places)) if python["weight"] is None else call("weight").expand(len(places))
    )
    if python["score"] is None:
        return score.double(), seen, weight.double(), torch.ones(len(places)).double(), []
    of_score = lambda x: call("score", score=x)  # noqa: E731
    value, slope = torch.func.jvp(of_score, (scaled,), (torch.ones_like(scaled),))
    slopes = []
    for tensor in with_gradient(bound):
        of_tensor = lambda x, tensor=tensor: call("score", score=scaled, **{tensor: x})  # noqa: E731
        leaf = captured[tensor]
        slopes.append(torch.func.jvp(of_tensor, (leaf,), (torch.ones_like(leaf),))[1])
    return value, seen, weight.double(), slope, slopes


@pytest.mark.parametrize("name", MADE)
def test_hooks_mean_the_same_on_both_devices(ask, name):
    places = random_places(random.Random(name), 300)
    forward, weighed, _, value, hidden, slope, weight, *slopes = ask(name, places).T
    right, seen, right_weight, right_slope, right_slopes = expected(name, places)
    assert seen.any()
    assert torch.equal(hidden == 0, seen)
    assert torch.equal(forward == -math.inf, ~seen)
    assert len(slopes) == len(right_slopes)
    pairs = [(forward, right), (value, right), (slope, right_slope), (weight, right_weight)]
    for got, wanted in (*pairs, *zip(slopes, right_slopes, strict=True)):
        assert torch.allclose(got[seen], wanted[seen], rtol=2e-5, atol=2e-5, equal_nan=True)
    if MADE[name].variant.hooks.weight is not None:
        assert torch.allclose(weighed[seen], right_weight[seen], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MADE)
def test_what_is_hidden_adds_nothing(ask, name):
    """Neither by a mask nor by a hook, wherever the place is: slopes and weights of hidden scores
    are 0, also where a hook's would be infinite or NaN, and so is what is left of a P of 0."""
    places = random_places(random.Random(name), 300, beyond=70)
    masked = [(*place[:-1], MASKED) for place in places]
    for some in (places, masked):
        forward, _, unseen, _, hidden, slope, weight, *slopes = ask(name, some).T
        if some is masked:
            assert hidden.all()
        else:
            assert (forward[hidden == 1] == -math.inf).all()
        assert not unseen.any()
        for factor in (slope, weight, *slopes):
            assert (factor[hidden == 1] == 0).all()


@pytest.mark.parametrize("name", ["bias", "document", "weighed", "mixed"])
def test_no_hook_reads_beyond_a_tensor(ask, name):
    """Not even where sequences are longer than the call's max_seqlen says: the sanitizer tells."""
    places = random_places(random.Random(name), 300, beyond=70)
    longer = [(*place[:6], place[6] + 40, place[7] + 50, place[8]) for place in places]
    assert len(ask(name, longer)) == len(places)
    if name == "bias":  # of any size: one of 1 in both
        assert len(ask(name, longer, 1, 1)) == len(places)


STATISTICS = """
#include <iostream>
#include "cute_kernels/attention/backward/statistics.hpp"
using namespace cute_kernels::attention;

int main() {
  StatisticParts<4> parts;
  StatisticParts<4, true> read;
  std::string lse, minus_delta;
  float scale;
  std::cout.precision(9);
  // As WGMMA adds up the parts of lse.
  auto sum = [](auto const& row) {
    return static_cast<float>(row[2]) + static_cast<float>(row[1]) + static_cast<float>(row[0]);
  };
  while (std::cin >> lse >> minus_delta >> scale) {
    parts.set(2, std::stof(lse), std::stof(minus_delta), scale);
    read.set(2, std::stof(lse), std::stof(minus_delta), scale);
    std::cout << sum(parts.rows[2]) << ' ' << read.minus_lse(2) << ' ' << read.minus_delta(2)
              << ' ' << 0.f * sum(read.rows[2]) << '\\n';
  }
}
"""


def test_statistics_come_back_from_their_parts(tmp_path):
    """As WGMMA adds them up and as threads read them, to a float's 24 bits; of an lse that is
    infinite, what makes every P 0, and of a delta that is not finite, infinity. What delta's
    product has of lse is 0."""
    chance = random.Random(0)
    cases = [(chance.gauss(0, 1) * 10 ** chance.uniform(-4, 4) for _ in "ld") for _ in range(200)]
    cases = [(*case, chance.choice([1.0, math.log(2), 0.125])) for case in cases]
    cases += [(lse, 1.5, 1.0) for lse in (-math.inf, math.inf, math.nan)]
    cases += [(2.0, minus_delta, 0.5) for minus_delta in (math.inf, -math.inf, math.nan)]
    answers = device_program(tmp_path, STATISTICS)(cases, number=float)
    for (lse, minus_delta, scale), found in zip(cases, answers, strict=True):
        if math.isnan(lse):
            assert all(math.isnan(found[i]) for i in (0, 1, 3))
        else:
            right = -(2.0**120) if math.isinf(lse) else -lse / scale
            assert found[:2] == pytest.approx([right] * 2, rel=2**-22)
            assert found[3] == 0
        right = minus_delta if math.isfinite(minus_delta) else math.inf
        assert found[2] == pytest.approx(right, rel=2**-22)


SOFTCAP = """
#include <iostream>
#include <limits>
#include "cute_kernels/attention/softcap.hpp"
using namespace cute_kernels;
using namespace cute_kernels::attention;

struct One {
  float value;
  float& operator()(int) { return value; }
  float operator()(int) const { return value; }
};
struct Params {
  Softcap::Arguments variant;
};

// tanh, from the exponent of P; whether that came straight from the product.
std::pair<float, bool> by_exponent(Params const& params, float product, float softcap) {
  One score{product};
  float const to_log2 = Softcap::unit(softcap) * sm90::kLog2e;
  bool is_near = true;
  auto const how = Softcap::gives_exponents(params, score, is_near);
  if (how == Exponents::kNone) {
    Softcap::change(params, score, 0);
    return {score.value, false};
  }
  float found = 0.f;
  Softcap::exponents(params, how, [&](auto const& exponent) {
    found = (exponent(product, 1.f) + 1.f) / to_log2;
  });
  return {found, true};
}

int main() {
  std::string score;
  float scale, softcap;
  std::cout.precision(9);
  while (std::cin >> score >> scale >> softcap) {
    Params const params{Softcap::arguments_of(scale, softcap)};
    One fast{std::stof(score)}, again = fast, prepared = fast;
    auto const [exponent, straight] = by_exponent(params, fast.value, softcap);
    Softcap::change(params, fast, 0);
    Softcap::change_again(params, again, 0);
    Softcap::prepare(params, prepared);
    auto const changed = Softcap::element(params, prepared.value, false, NoPlaces{});
    std::cout << fast.value << ' ' << again.value << ' ' << changed.value << ' ' << exponent << ' '
              << changed.slope << ' ' << straight << '\\n';
  }
}
"""


def test_softcap_is_a_tanh(tmp_path):
    """Near 0 and far from it, to 3e-7, and so is the second look at a block; its slope. A factor
    beyond a float takes all but 0 to the ends."""
    chance = random.Random(0)
    cases = [
        (chance.gauss(0, 1) * 10 ** chance.uniform(-3, 3), 0.125, chance.choice([0.7, 5.0, 50.0]))
        for _ in range(500)
    ]
    cases += [(chance.gauss(0, 1), 0.125, 10**power) for power in range(-30, 31) for _ in "ab"]
    ends = [(x, 1e30, 1e-30) for x in (0.0, 1e-20, -2.0)]
    ends += [(x, 1.0, 1.0) for x in (math.inf, -math.inf, math.nan)] + [(3.0, 0.0, 50.0)]
    answers = device_program(tmp_path, SOFTCAP)(cases + ends, number=float)
    for (score, scale, softcap), found in zip(cases + ends, answers, strict=True):
        if math.isnan(score):
            assert all(map(math.isnan, found[:5]))
            continue
        right = math.tanh(score * scale / softcap)
        assert found[:3] == pytest.approx([right] * 3, rel=0, abs=3e-7)
        # A second look at a large softcap's scores: to a part of themselves
        assert found[1] == pytest.approx(right, rel=2e-6, abs=1e-36)
        # An exponent's last bit is worth more where its unit is small.
        unit = max(softcap, 2.0**-40) * math.log2(math.e)
        assert abs(found[3] - right) <= 3e-7 + 2**-23 / unit
        assert abs(found[4] - (1 - right**2)) <= 1e-6
        assert not found[5] or abs(right) < 0.605
    # Straight from the products where they are near 0, at every softcap in use.
    assert all(
        found[5] or abs(score) * scale > 0.699 * softcap or not 1e-4 <= softcap <= 1e6
        for (score, scale, softcap), found in zip(cases, answers, strict=False)
    )


EVERY_SOFTCAP = """
int main() {
  // Every `step`-th float up to `last`, and their largest error.
  float scale, softcap, last;
  uint32_t step;
  while (std::cin >> scale >> softcap >> last >> step) {
    Params const params{Softcap::arguments_of(scale, softcap)};
    double const factor = double{scale} / softcap;
    double worst[] = {0., 0., 0.};
    auto compare = [&](int which, double found, double right) {
      worst[which] = std::max(worst[which], std::abs(found - right));
    };
    for (uint32_t bits = __float_as_uint(0x1p-14f / factor);
         bits <= __float_as_uint(last / factor); bits += step) {
      One score{__uint_as_float(bits)}, prepared = score;
      double const right = std::tanh(score.value * factor);
      compare(0, by_exponent(params, score.value, softcap).first, right);
      Softcap::change(params, score, 0);
      compare(1, score.value, right);
      Softcap::prepare(params, prepared);
      compare(2, prepared.value, right);
    }
    std::cout << worst[0] << ' ' << worst[1] << ' ' << worst[2] << '\\n';
  }
}
"""


def test_softcap_is_a_tanh_of_every_float(tmp_path):
    """Of one in 499 up to where tanh is 1, at the head dims' scales and softcaps in use; smaller
    ones are themselves to 1e-9. In exponents, off by no more than their own last bit."""
    program = SOFTCAP[: SOFTCAP.index("int main")] + EVERY_SOFTCAP
    cases = [
        (head_dim**-0.5, softcap, 9.0, 499)
        for head_dim in (64, 128, 256)
        for softcap in (15.0, 30.0, 50.0)
    ]
    for found in device_program(tmp_path, program)(cases, number=float):
        assert max(found) <= 3e-7


def test_softcap_hides(tmp_path):
    """What a mask hides has no P and a slope that is finite, with every softcap and lse."""
    program = (
        SOFTCAP[: SOFTCAP.index("int main")]
        + """
int main() {
  float softcap, minus_lse;
  while (std::cin >> softcap >> minus_lse) {
    Params const params{Softcap::arguments_of(1.f, softcap)};
    auto const hidden = Softcap::element(params, Softcap::kHidden, true, NoPlaces{});
    float const scale_log2 = Softcap::unit(softcap) * sm90::kLog2e;
    std::cout << hidden.hidden << ' ' << std::fma(hidden.value, scale_log2, minus_lse) << ' '
              << hidden.slope << '\\n';
  }
}
"""
    )
    # An lse is at least -softcap, but for one that is infinite.
    cases = [(cap, most) for cap in (1e-45, 1e-20, 1e-6, 50.0, 1e30) for most in (0, 1.5 * cap)]
    for hidden, exponent, slope in device_program(tmp_path, program)(cases, number=float):
        assert hidden == 1
        assert exponent < -1000
        assert math.isfinite(slope)
