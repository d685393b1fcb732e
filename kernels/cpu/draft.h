// Drafts: what may come next, read from what came before.
#pragma once
#include "abi.h"

// The place behind the earlier tokens that are most like the last ones: of all places before `known`, the one that is
// preceded by the most tokens equal to the last of the `known` ones, counted up to kMostEqual, and of those the latest.
// `known` where at least kLeastEqual are equal nowhere.
uint32_t find_continuation(const uint32_t* tokens, uint32_t known);

constexpr uint32_t kLeastEqual = 2, kMostEqual = 16;
