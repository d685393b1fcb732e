// AMX: linears by tiles of 16 rows x 16 outputs x 32 inputs, all else with AVX-512. PAGEHOLD_EMULATE runs the same
// file without either, for tests on other machines.
#include <stdint.h>
#include <string.h>
#define W 16
#define NAME "amx"
#define TABLE amx_table
#define BFLOAT16_DOT
#define TILES
#include "bfloat16_dot.inl"
//
#include "tiles.inl"
//
#include "step.inl"
