// Any x86-64: SSE2.
#define W 4
#define NAME "portable"
#define TABLE portable_table
#include "step.inl"
