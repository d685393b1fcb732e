// Which tokens of a row may be drawn: top-k, then top-p of these, without sorting.
//
// A token's rank is one integer, (order-preserving bits of z, inverted id), so that larger is better, ties to the lower
// id are ranks of their own, and a filter is one number: the least rank that stays. A filter looks for it by histograms
// of units (tokens for top-k, weights for top-p), each pass in the bin where the units reach what is asked for:
// first in equal steps of z below the best, then in ever smaller intervals of ranks. Weights are fixed-point integers:
// sums do not depend on the order of the threads.
#pragma once
#include "device.cuh"

#ifndef THREADS
#define THREADS 1024
#endif
#ifndef LISTED  // tokens that the list in shared memory has room for
#define LISTED 2048
#endif

constexpr u32 kThreads = THREADS, kWarps = THREADS / 32;
constexpr u32 kBinBits = 11, kBins = 1u << kBinBits, kOwnBins = kBins / kThreads;
static_assert(kThreads % 32 == 0 && kThreads <= 1024 && kBins % kThreads == 0, "each thread owns whole bins");

// --- ranks ---

using Rank = u64;  // 0: of no token that may be drawn

constexpr u32 kIdBits = 20, kIdMask = (1u << kIdBits) - 1;
constexpr u32 kMinusInfinity = 0xff800000u, kInfinityKey = 0xff800000u;  // bits; a key

// Ordered like x; 0 for -inf and NaN, which are never drawn. -0 counts as 0.
DEVICE u32 key_of(float x) {
  if (!(x > as_float(kMinusInfinity))) return 0;
  const u32 bits = as_u32(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float of_key(u32 key) { return as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

DEVICE Rank rank_of(float x, u32 id) {
  const u32 key = key_of(x);
  return key == 0 ? 0 : static_cast<Rank>(key) << kIdBits | (kIdMask - id);
}
DEVICE u32 rank_key(Rank rank) { return static_cast<u32>(rank >> kIdBits); }
DEVICE u32 rank_id(Rank rank) { return kIdMask - (static_cast<u32>(rank) & kIdMask); }
DEVICE float rank_value(Rank rank) { return of_key(rank_key(rank)); }

// --- weights ---

// exp(x - most) with 44 bits behind the point: 2^19 of them fit into 64 bits. most is at least x.
constexpr double kOneWeight = 17592186044416.0;

DEVICE u64 fixed_weight(float x, float most) {
  const double below = static_cast<double>(x) - static_cast<double>(most);
  return below > -32.0 ? static_cast<u64>(exp_accurate(below) * kOneWeight + 0.5) : 0;
}

// --- across the block ---

struct Sum {
  template <class T>
  DEVICE static T of(T a, T b) {
    return a + b;
  }
};
struct Most {
  template <class T>
  DEVICE static T of(T a, T b) {
    return b > a ? b : a;
  }
};
struct Least {
  template <class T>
  DEVICE static T of(T a, T b) {
    return b < a ? b : a;
  }
};

// Of all threads' values, to all threads. room: shared, one element a warp.
template <class Operation>
DEVICE u64 across_block(u64 value, u64 none, u64* room) {
  for (int distance = 16; distance > 0; distance /= 2) value = Operation::of(value, shuffle_xor(value, distance));
  if (lane_id() == 0) room[warp_id()] = value;
  sync_block();
  value = static_cast<u32>(lane_id()) < kWarps ? room[lane_id()] : none;
  for (int distance = 16; distance > 0; distance /= 2) value = Operation::of(value, shuffle_xor(value, distance));
  sync_block();
  return value;
}

// --- the filters ---

struct RankingRoom {  // shared memory
  Rank list[LISTED];
  u64 reduced[32];
  u32 counts[kBins], weights_low[kBins], weights_high[kBins];
  u32 listed;
  struct Bin {
    u32 index, count;
    u64 before;  // units of better bins
  } found;
};

// The tokens of a row: the whole vocabulary, or a list once few are left.
template <class Logit>
struct Tokens {
  const Logit* logits;
  const u32* changed;  // bits of the logits after penalties, bias and suppression; null: no change
  float temperature;
  u32 vocab;
  const Rank* list;  // null: none yet
  u32 listed;

  DEVICE u32 count() const { return list ? listed : vocab; }
  DEVICE Rank of_token(u32 id) const {
    return rank_of((changed ? as_float(changed[id]) : to_float(logits[id])) / temperature, id);
  }
  DEVICE Rank rank(u32 i) const { return list ? list[i] : of_token(i); }
};

template <class Logit>
class Ranking {
 public:
  // most, least: of the tokens that may be drawn. All threads of the block call each of the public functions.
  DEVICE Ranking(const Tokens<Logit>& tokens, float most, float least, RankingRoom* room)
      : tokens_(tokens), room_(room), most_(most) {
    const float span = most - least < 32.0f ? most - least : 32.0f;
    steps_ = (kBins - 1) / (span > 1e-30f ? span : 1e-30f);
  }

  DEVICE void keep_best(u32 count) { cut(false, count, 1.0f); }

  // A token stays while those before it hold less than this part of the weight: the first always does.
  DEVICE void keep_part(float part) { cut(true, 0, part); }

  DEVICE const Tokens<Logit>& tokens() const { return tokens_; }
  DEVICE Rank floor() const { return floor_; }

 private:
  // In equal steps of z below the best: ordered like the ranks, and even where the floats' bits are not.
  DEVICE u32 step(Rank rank) const {
    const float steps = (most_ - rank_value(rank)) * steps_;
    return steps < kBins - 1 ? static_cast<u32>(steps) : kBins - 1;
  }

  DEVICE void clear() {
    for (u32 bin = threadIdx.x; bin < kBins; bin += kThreads) {
      room_->counts[bin] = room_->weights_low[bin] = room_->weights_high[bin] = 0;
    }
    sync_block();
  }

  // A 64-bit addition to shared memory would be a compare-and-swap loop, slow where many meet in one bin: whoever makes
  // the low half wrap carries.
  DEVICE void add(u32 bin, Rank rank, bool weighted) {
    atomic_add(&room_->counts[bin], 1u);
    if (!weighted) return;
    const u64 weight = fixed_weight(rank_value(rank), most_);
    const u32 low = static_cast<u32>(weight), old = atomic_add(&room_->weights_low[bin], low);
    const u32 high = static_cast<u32>(weight >> 32) + (old + low < old);
    if (high) atomic_add(&room_->weights_high[bin], high);
  }

  DEVICE u64 units(u32 bin, bool weighted) const {
    if (!weighted) return room_->counts[bin];
    return static_cast<u64>(room_->weights_high[bin]) << 32 | room_->weights_low[bin];
  }

  DEVICE u64 own_units(bool weighted) const {
    u64 own = 0;
    for (u32 i = 0; i < kOwnBins; ++i) own += units(threadIdx.x * kOwnBins + i, weighted);
    return own;
  }

  // The first bin with which the units reach `enough`, which is at least 1; index kBins where they never do.
  DEVICE RankingRoom::Bin find(u64 enough, bool weighted) {
    const u64 own = own_units(weighted);
    u64 before = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const u64 other = shuffle_up(before, distance);
      if (lane_id() >= distance) before += other;
    }
    if (lane_id() == 31) room_->reduced[warp_id()] = before;
    if (threadIdx.x == 0) room_->found.index = kBins;
    sync_block();
    before -= own;
    for (int warp = 0; warp < warp_id(); ++warp) before += room_->reduced[warp];
    if (before < enough && enough <= before + own) {
      u32 bin = threadIdx.x * kOwnBins;
      for (; before + units(bin, weighted) < enough; ++bin) before += units(bin, weighted);
      room_->found = {bin, room_->counts[bin], before};
    }
    sync_block();
    return room_->found;
  }

  // Raises the floor to the least rank that stays where the best stay until their units reach `enough`, a part of all
  // where weighted.
  DEVICE void cut(bool weighted, u64 enough, float part) {
    clear();
    for (u32 i = threadIdx.x; i < tokens_.count(); i += kThreads) {
      const Rank rank = tokens_.rank(i);
      if (rank >= floor_) add(step(rank), rank, weighted);
    }
    sync_block();
    if (weighted) enough = part_of(across_block<Sum>(own_units(true), 0, room_->reduced), part);
    RankingRoom::Bin bin = find(enough, weighted);
    if (bin.index == kBins) return;
    if (!tokens_.list) list_to(bin.index);

    Rank low = ~Rank{0}, high = 0;
    for (u32 i = threadIdx.x; i < tokens_.count(); i += kThreads) {
      const Rank rank = tokens_.rank(i);
      if (rank < floor_ || step(rank) != bin.index) continue;
      low = Least::of(low, rank);
      high = Most::of(high, rank);
    }
    low = across_block<Least>(low, ~u64{0}, room_->reduced);
    high = across_block<Most>(high, 0, room_->reduced);
    enough -= bin.before;
    // Here: the units of [low, high] reach `enough`, and only of tokens that are counted above.
    while (low != high && !(weighted ? bin.count == 1 : enough == bin.count)) {
      u32 shift = 0;
      while ((high - low) >> shift >= kBins) ++shift;
      clear();
      for (u32 i = threadIdx.x; i < tokens_.count(); i += kThreads) {
        const Rank rank = tokens_.rank(i);
        if (low <= rank && rank <= high) add(static_cast<u32>((high - rank) >> shift), rank, weighted);
      }
      sync_block();
      bin = find(enough, weighted);
      enough -= bin.before;
      high -= static_cast<u64>(bin.index) << shift;
      const Rank end = high - ((Rank{1} << shift) - 1);
      low = end > low && end <= high ? end : low;
    }
    floor_ = low;
  }

  // At least 1, so that the best token stays.
  DEVICE static u64 part_of(u64 total, float part) {
    const double exact = static_cast<double>(part) * static_cast<double>(total);
    const u64 whole = static_cast<u64>(exact);
    const u64 enough = static_cast<double>(whole) < exact ? whole + 1 : whole;
    return enough ? enough : 1;
  }

  // Goes on with a list of the tokens down to this step, if there is room for them.
  DEVICE void list_to(u32 last) {
    u64 own = 0;
    for (u32 i = 0; i < kOwnBins; ++i) {
      const u32 bin = threadIdx.x * kOwnBins + i;
      if (bin <= last) own += room_->counts[bin];
    }
    if (across_block<Sum>(own, 0, room_->reduced) > LISTED) return;
    if (threadIdx.x == 0) room_->listed = 0;
    sync_block();
    for (u32 i = threadIdx.x; i < tokens_.count(); i += kThreads) {
      const Rank rank = tokens_.rank(i);
      if (rank >= floor_ && step(rank) <= last) room_->list[atomic_add(&room_->listed, 1u)] = rank;
    }
    sync_block();
    tokens_.list = room_->list;
    tokens_.listed = room_->listed;
  }

  Tokens<Logit> tokens_;
  RankingRoom* room_;
  float most_, steps_;
  Rank floor_ = 1;
};
