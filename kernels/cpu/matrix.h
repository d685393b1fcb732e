// One row of a matrix in panels, for embeddings that are tied to the output head.
#pragma once
#include "abi.h"

float bfloat16_to_float(uint16_t half);
// Row `row` of a matrix with `columns` inputs into out [columns], rounded to bfloat16 as linears use it.
void read_row(const PhMatrix& matrix, uint32_t columns, uint32_t row, float* out);
