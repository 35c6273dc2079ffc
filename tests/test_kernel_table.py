"""What the dispatcher chooses among, in C++: the kernels of a build and added ones. No GPU."""

import subprocess

import pytest
from compilers import compile_program

MAIN = r"""
#include <cstdio>
#include <string>
#include <thread>
#include <vector>
#include "cute_kernels/attention/fp8_tile_config.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {
constexpr auto kBf16 = ElementType::kBFloat16;
constexpr auto kAny = MaskClass::kAny;
constexpr auto kNone = MaskClass::kNone;  // never chosen
ForwardKernel const kForward[] = {
    {{"f64", kBf16, 64, 64, false, false, nullptr, kAny, 128, 1.0, 0}, nullptr, nullptr}};
BackwardKernel const kBackward[] = {
    {{"b64", kBf16, 64, 64, false, false, nullptr, kAny, 128}, nullptr, nullptr},
    {{"b128", kBf16, 128, 128, false, false, nullptr, kAny, 128}, nullptr, nullptr}};
KernelTable<ForwardKernel> forward_kernels{kForward, 1};
KernelTable<BackwardKernel> backward_kernels{kBackward, 2};
KernelTable<Fp8ForwardKernel> fp8_forward_kernels{nullptr, 0};
}  // namespace cute_kernels::attention

using namespace cute_kernels::attention;

template <class Kernel>
void show(char const* what, Kernel const* kernel) {
  std::printf("%s: %s\n", what, kernel == nullptr ? "none" : kernel->config.name);
}

AttentionCall call(int head_dim, bool causal) {
  return {{1, 1024, 1024, 8, 8, head_dim, head_dim}, mask_spec(causal), 1.f};
}

ForwardKernel const* forward(bool causal) { return choose_forward(kBf16, call(64, causal), 132); }

BackwardKernel const* backward(int head_dim, bool causal) {
  return choose_fitting(backward_kernels, kBf16, call(head_dim, causal));
}

Fp8ForwardKernel const* int8() {
  return choose_fitting(fp8_forward_kernels, ScoreType::kInt8, call(64, false));
}

int main() {
  show("built backward 64", backward(64, false));
  static BackwardKernel const added[] = {
      {{"mine64", kBf16, 64, 64, false, false, nullptr, MaskClass::kCausal, 64}, nullptr, nullptr},
      {{"mine192", kBf16, 192, 192, false, false, nullptr, kAny, 64}, nullptr, nullptr},
      {{"b64", kBf16, 64, 64, false, false, nullptr, kAny, 64}, nullptr, nullptr},
      {{"none64", kBf16, 64, 64, false, false, nullptr, kNone, 64}, nullptr, nullptr}};
  for (auto const& kernel : added) std::printf("%d", backward_kernels.add(kernel));
  std::printf("\n");
  for (auto const& kernel : backward_kernels) std::printf("%s ", kernel.config.name);
  std::printf("\n");
  show("causal 64", backward(64, true));
  show("full 64", backward(64, false));
  show("full 136", backward(136, false));
  show("full 200", backward(200, false));

  show("no fp8", int8());
  static Fp8ForwardKernel const fp8{
      {"int8", ScoreType::kInt8, 64, 64, false, false, nullptr, kAny, 128}, nullptr, nullptr};
  static Fp8ForwardKernel const e4m3{
      {"e4m3", ScoreType::kE4m3, 64, 64, false, false, nullptr, kAny, 128}, nullptr, nullptr};
  fp8_forward_kernels.add(fp8);
  fp8_forward_kernels.add(e4m3);
  show("fp8", int8());
  std::printf("%d\n", fp8_forward_kernels.is_built());

  show("forward", forward(false));
  static ForwardKernel const fast{
      {"fast", kBf16, 64, 64, false, false, nullptr, MaskClass::kFull, 128, 1.5, 0},
      nullptr,
      nullptr};
  forward_kernels.add(fast);
  static ForwardKernel const none{
      {"none", kBf16, 64, 64, false, false, nullptr, kNone, 128, 99.0, 0}, nullptr, nullptr};
  forward_kernels.add(none);
  show("full forward", forward(false));
  show("causal forward", forward(true));

  // For any call, and faster than all.
  AttentionCall window = call(64, true), covering = call(64, true), packed = call(64, false);
  window.mask.left = 100;
  covering.mask.left = 1023;
  int const starts[] = {0, 1024};
  packed.packed = {starts, starts, nullptr, nullptr, nullptr, 1024, 1024};
  AttentionCall wide = call(64, false);
  wide.sizes.head_dim_v = 128;
  auto any = [&](char const* what, AttentionCall const& call) {
    show(what, choose_forward(kBf16, call, 132));
  };
  any("window without one", window);
  static ForwardKernel const for_any[] = {
      {{"any64", kBf16, 64, 64, true, false, nullptr, kAny, 128, 9.0, 0}, nullptr, nullptr},
      {{"any128", kBf16, 64, 128, true, false, nullptr, kAny, 128, 9.0, 0}, nullptr, nullptr}};
  for (auto const& kernel : for_any) forward_kernels.add(kernel);
  any("window", window);
  any("window that hides nothing", covering);
  any("packed", packed);
  any("causal", call(64, true));
  any("wide v", wide);

  // Of windows that are short beside its blocks, where groups of heads are rows of a tile.
  static ForwardKernel const of_windows{
      {"window", kBf16, 64, 64, false, false, nullptr, kAny, 128, 9.0, 0, true, 136},
      nullptr,
      nullptr};
  forward_kernels.add(of_windows);
  AttentionCall grouped = packed;
  grouped.sizes.heads_kv = 1;
  any("packed without a window", grouped);
  grouped.mask = {std::nullopt, 128, 0};
  any("short window", grouped);
  grouped.mask.left = 129;
  any("a longer one", grouped);
  window.mask.left = 20;
  any("short, groups of one head", window);
  grouped.mask.left = 20;
  grouped.softcap = 1.f;
  any("short, softcap", grouped);

  // Of a variant, and faster than all.
  static ForwardKernel const of_variant{
      {"mine", kBf16, 64, 128, true, false, "mine_0", kAny, 128, 99.0, 0}, nullptr, nullptr};
  forward_kernels.add(of_variant);
  any("wide v beside a variant's", wide);
  wide.has_variant = true;
  std::printf("%d%d\n", can_take(of_variant.config, kBf16, wide),
              can_take(for_any[1].config, kBf16, wide));

  // Readers beside four that add: each sees all that was there when it started.
  constexpr int kEach = 500;
  static std::vector<std::string> names;
  static std::vector<ForwardKernel> kernels;
  for (int i = 0; i < 4 * kEach; ++i) names.push_back("k" + std::to_string(i / 2));
  for (auto const& name : names) {
    kernels.push_back(
        {{name.c_str(), kBf16, 64, 64, false, false, nullptr, kAny, 128, 1., 0}, nullptr, nullptr});
  }
  std::atomic<int> added_count{0}, lost{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = thread; i < 4 * kEach; i += 4) added_count += forward_kernels.add(kernels[i]);
    });
    threads.emplace_back([&] {
      for (int last = 0, round = 0; round < 200; ++round) {
        int count = 0;
        for (ForwardKernel const& kernel : forward_kernels) count += kernel.config.head_dim == 64;
        if (count < last) ++lost;
        last = count;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  int count = 0;
  for ([[maybe_unused]] ForwardKernel const& kernel : forward_kernels) ++count;
  std::printf("%d added, %d there, %d lost\n", added_count.load(), count, lost.load());
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    program = compile_program(MAIN, tmp_path_factory.mktemp("table"))
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_added_kernels_stand_behind_the_builds_and_no_name_twice(said):
    assert said[1:3] == ["1101", "b64 b128 mine64 mine192 none64 "]


def test_of_backward_kernels_the_last_that_fits_is_chosen(said):
    assert said[0] == "built backward 64: b64"
    assert said[3:7] == [
        "causal 64: mine64",
        "full 64: b64",
        "full 136: mine192",
        "full 200: none",
    ]


def test_an_empty_table_takes_kernels(said):
    assert said[7:10] == ["no fp8: none", "fp8: int8", "0"]


def test_the_estimate_weighs_added_forward_kernels(said):
    assert said[10:13] == ["forward: f64", "full forward: fast", "causal forward: f64"]


def test_kernels_for_any_call_take_what_those_for_dense_ones_do_not(said):
    assert said[13:19] == [
        "window without one: none",
        "window: any64",
        "window that hides nothing: f64",
        "packed: any64",
        "causal: f64",
        "wide v: any128",
    ]


def test_kernels_of_short_windows_take_these_alone(said):
    assert said[19:24] == [
        "packed without a window: any64",
        "short window: window",
        "a longer one: any64",
        "short, groups of one head: any64",
        "short, softcap: none",
    ]


def test_kernels_of_variants_take_calls_with_one_and_no_others(said):
    assert said[24:26] == ["wide v beside a variant's: any128", "10"]


def test_many_threads_may_add_while_others_read(said):
    assert said[-1] == "1000 added, 1007 there, 0 lost"
