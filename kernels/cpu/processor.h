// Which instruction sets this processor has.
#pragma once
#include "isa.h"

// isa: a name, or null for the best. Null where the processor lacks it, or there is none of that name.
const IsaTable* choose_isa(const char* isa, bool bfloat16_inputs);
// Space-separated names of what the processor has, the plainest first.
const char* isa_names();
