// AVX2 and FMA; bfloat16 is widened by a shift.
#define W 8
#define NAME "avx2"
#define TABLE avx2_table
#include "step.inl"
