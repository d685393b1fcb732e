// Functions as exact as results need that are rounded to bfloat16, in few instructions.

namespace {

// 2^x to 3e-6; what is below 2^-126 may be 0, what is above 2^127 is at least that.
inline vf exponential2(vf x) {
#ifndef PAGEHOLD_EMULATE
  const vf r = reinterpret_cast<vf>(_mm512_maskz_reduce_ps(0xffff, reinterpret_cast<__m512>(x), 1));  // x - floor(x)
#else
  const vf high = x > splat(127.0f) ? splat(127.0f) : x;
  const vf clamped = high < splat(-126.0f) ? splat(-126.0f) : high;
  vi whole = __builtin_convertvector(clamped, vi);
  whole += __builtin_convertvector(whole, vf) > clamped;  // -1 where it is
  const vf r = clamped - __builtin_convertvector(whole, vf);
#endif
  vf p = splat(1.35341680e-2f);
  p = p * r + 5.20114621e-2f;
  p = p * r + 2.41442755e-1f;
  p = p * r + 6.93003835e-1f;
  p = p * r + 1.0f;
#ifndef PAGEHOLD_EMULATE
  return reinterpret_cast<vf>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));  // p * 2^floor(x)
#else
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (whole << 23));
#endif
}

// To 2^-14.
inline vf reciprocal(vf x) {
#ifndef PAGEHOLD_EMULATE
  return reinterpret_cast<vf>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
#else
  return 1.0f / x;
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

inline vf coarse_silu(vf x) { return x * reciprocal(exponential2(x * -kLog2E) + 1.0f); }

}  // namespace
