// Vector exp and the normal distribution function, to a few units in the last place of fp32. NaN goes through.
#pragma once

namespace {

inline F select_gt0(F x, F yes, F no) { return blend_gt(x, set1(0), yes, no); }

// exp(x) for x <= 0 (and up to about 88); below -87.3 the answer is 1.2e-38 in the place of a smaller number.
inline F exp(F x) {
  x = min(set1(88.0f), max(set1(-87.3f), x));  // this order hands NaN on: both return the second operand then
  const F n = round(x * set1(1.44269504f));
  F r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.0f / 720);  // Taylor on |r| <= 0.347: the first term left out is 1.2e-7 r^6
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return p * exp2_int(n);
}

// The standard normal's distribution function (cdf) and density at x. For x < 0, cdf = exp(-x^2/2) h(|x|) with
// h(a) = erfcx(a / sqrt 2) / 2 = t poly(t), t = 1 / (1 + a/4), a least-maximum fit of relative error 3.4e-8 (tools: numpy, scipy).
inline void normal(F x, F& cdf, F& density) {
  const F a = min(set1(64.0f), abs(x));  // NaN goes through e
  // Beyond exp's range e is zero, not its least number: a slope is multiplied by gradients as large as 3e38.
  const F square = x * x, e = blend_gt(square, set1(174.6f), set1(0), exp(square * set1(-0.5f)));
  const F t = reciprocal(fma(a, set1(0.25f), set1(1.0f)));
  constexpr float c[] = {
      0.0997355655f, 0.0997364298f, 0.0934663489f, 0.0816031545f, 0.0589748695f, 0.0637000799f,
      -0.0317194723f, 0.0955993235f, -0.0808786824f, 0.0197823551f};
  F p = set1(c[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i) p = fma(p, t, set1(c[i]));
  const F lower = e * p * t;
  cdf = select_gt0(x, set1(1.0f) - lower, lower);
  density = e * set1(0.398942280f);
}

// tanh(x) by exp(-2|x|); near zero, where that cancels, by the odd series.
inline F tanh(F x) {
  const F a = abs(x), e = exp(a * set1(-2.0f));
  const F large = (set1(1.0f) - e) * reciprocal(set1(1.0f) + e);
  const F s = x * x;
  F p = set1(-17.0f / 315);
  p = fma(p, s, set1(2.0f / 15));
  p = fma(p, s, set1(-1.0f / 3));
  const F small = fma(p * s, a, a);
  return copysign(blend_gt(a, set1(0.12f), large, small), x);
}

}  // namespace
