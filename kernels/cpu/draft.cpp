#include "draft.h"

#include <algorithm>
#include <new>
#include <vector>

namespace {

constexpr uint32_t kBlock = 64;  // places that are looked at together

// How many tokens before `place` are those before `known`, up to kMostEqual.
uint32_t equal_before(const uint32_t* tokens, uint32_t place, uint32_t known) {
  const uint32_t most = std::min(place, kMostEqual);
  uint32_t equal = 0;
  while (equal < most && tokens[place - 1 - equal] == tokens[known - 1 - equal]) ++equal;
  return equal;
}

// Whether any of the places [first, first + count) has the tokens `before` and `last` in front of it. Without a branch,
// so that it is done with vectors.
bool any_place(const uint32_t* tokens, uint32_t first, uint32_t count, uint32_t before, uint32_t last) {
  const uint32_t* at = tokens + first - 2;
  uint32_t any = 0;
  if (count == kBlock) {
    for (uint32_t i = 0; i < kBlock; ++i) any |= (at[i] == before) & (at[i + 1] == last);
  } else {
    for (uint32_t i = 0; i < count; ++i) any |= (at[i] == before) & (at[i + 1] == last);
  }
  return any != 0;
}

}  // namespace

uint32_t find_continuation(const uint32_t* tokens, uint32_t known) {
  static_assert(kLeastEqual >= 2, "two tokens are looked for at once");
  uint32_t best = known, most = kLeastEqual - 1;
  if (known < kLeastEqual) return known;
  const uint32_t before = tokens[known - 2], last = tokens[known - 1];
  // Backwards, so that the latest of equally good places is found first.
  for (uint32_t end = known; end > 2;) {
    const uint32_t count = std::min(kBlock, end - 2), first = end - count;
    if (any_place(tokens, first, count, before, last)) {
      for (uint32_t place = end; place-- > first;) {
        if (tokens[place - 1] != last || tokens[place - 2] != before) continue;
        const uint32_t equal = equal_before(tokens, place, known);
        if (equal <= most) continue;
        best = place;
        most = equal;
        if (most == kMostEqual) return best;
      }
    }
    end = first;
  }
  return best;
}

namespace {

void add_drafts(PhChunk* chunks, uint32_t count, uint32_t* drafts, uint32_t room) {
  std::vector<uint32_t> places(count), wanted(drafts, drafts + count);
  bool more = false;
  for (uint32_t c = 0; c < count; ++c) {
    const uint32_t known = chunks[c].start + chunks[c].count;
    places[c] = drafts[c] != 0 ? find_continuation(chunks[c].tokens, known) : known;
    if (places[c] == known) wanted[c] = 0;
    drafts[c] = 0;
    more = more || wanted[c] != 0;
  }
  // One for each in turn: a draft is the likelier to be right, the fewer have to be right before it.
  while (more && room > 0) {
    more = false;
    for (uint32_t c = 0; c < count && room > 0; ++c) {
      if (drafts[c] == wanted[c]) continue;
      ++drafts[c];
      --room;
      more = true;
    }
  }
  for (uint32_t c = 0; c < count; ++c) {
    PhChunk& chunk = chunks[c];
    uint32_t* behind = chunk.tokens + chunk.start + chunk.count;
    // In order: where what follows reaches the end, it goes on with its own beginning.
    for (uint32_t i = 0; i < drafts[c]; ++i) behind[i] = chunk.tokens[places[c] + i];
    chunk.count += drafts[c];
    chunk.sample += drafts[c];
  }
}

}  // namespace

extern "C" int pagehold_draft(PhChunk* chunks, uint32_t count, uint32_t* drafts, uint32_t room) {
  try {
    add_drafts(chunks, count, drafts, room);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
