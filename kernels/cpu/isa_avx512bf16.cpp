// AVX-512 with vdpbf16ps. PAGEHOLD_EMULATE runs the same file without it, for tests on other machines.
#include <stdint.h>
#include <string.h>
#define W 16
#define NAME "avx512bf16"
#define TABLE avx512bf16_table
#define BFLOAT16_DOT
#include "bfloat16_dot.inl"
//
#include "step.inl"
