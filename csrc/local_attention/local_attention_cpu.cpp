// The forward of local attention on the CPU.
//
// A task is a tile of queries of one head. Keys stream past it row by row; the scores of a group of
// rows are kept, turned into weights once, and the values stream past in the same order. Lanes are
// neighbouring queries, so every load is contiguous and no lane sums across. Each output belongs to
// one task and is summed in a fixed order: the bits do not depend on the number of threads.
#include "local_attention/local_attention.h"
#include "local_attention/vectors.h"
#include "local_attention/windows.h"
#include "parallel.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

constexpr int64_t kScores = 96;     // of one query between two merges into the softmax
constexpr int64_t kRowsKept = 256;  // moving rows between two merges

// The arguments of the register tiles, free of the element type so that all share their code.
// `still` and `out` are tiles as load_tile makes them; `filled` counts the scores each row has so
// far.
template <class T>
struct ScoreTile {
  const T* still;
  Moving<T> keys;
  const T* addends;
  const int64_t* slots;  // of each row's addends
  T* scores;
  const int64_t* filled;
  int64_t stride, vectors, capacity, channels;

  template <class R, class J>
  void operator()(R, J, int64_t r0, int64_t v, int64_t j0) const {
    constexpr int lanes = Simd<T>::lanes, kR = R::value, kJ = J::value;
    Vec<T> sums[kR][kJ];
    dots<T, kR, kJ>(still + (r0 * vectors + v) * channels * lanes, vectors * channels * lanes,
                    keys.at(j0) + v * lanes, keys, channels, sums);
    for (int r = 0; r < kR; ++r) {
      const T* addend = addends + slots[r0 + r] * stride + j0 * kTileColumns + v * lanes;
      T* to = scores + (((r0 + r) * vectors + v) * capacity + filled[r0 + r] + j0) * lanes;
#pragma GCC unroll 6
      for (int j = 0; j < kJ; ++j) {
        const Vec<T> add = load_vec(addend + j * kTileColumns);
        store_vec(to + j * lanes, where_seen(add, sums[r][j] + add, add));
      }
    }
  }
};

template <class T>
struct ValueTile {
  Moving<T> values;
  const T* weights;
  const int64_t* filled;
  T* out;
  int64_t vectors, capacity, channels;

  template <class R, class J>
  void operator()(R, J, int64_t r0, int64_t v, int64_t j0) const {
    constexpr int lanes = Simd<T>::lanes, kR = R::value, kJ = J::value;
    Vec<T> weight[kR][kJ];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const T* from = weights + (((r0 + r) * vectors + v) * capacity + filled[r0 + r] + j0) * lanes;
#pragma GCC unroll 6
      for (int j = 0; j < kJ; ++j) weight[r][j] = load_vec(from + j * lanes);
    }
    accumulate<T, kR, kJ>(weight, values.at(j0) + v * lanes, values, channels,
                          out + (r0 * vectors + v) * channels * lanes, vectors * channels * lanes);
  }
};

template <class E>
struct Forward {
  typedef typename Compute<E>::type T;
  static constexpr int lanes = Simd<T>::lanes;

  struct Kept {
    int64_t scale, row;
  };

  Forward(const LocalAttentionParams& p_, int64_t batch_, int64_t head_, const Tile& tile_)
      : p(p_),
        batch(batch_),
        head(head_),
        kv_head(head_ * p_.kv_heads / p_.heads),
        tile(tile_),
        capacity(kScores),
        row_size(tile.vectors * p.channels * lanes),
        queries(tile.rows * row_size),
        out(tile.rows * row_size),
        largest(tile.rows * kTileColumns),
        total(tile.rows * kTileColumns) {
    load_tile<E>(tile, p.q, batch, head, p.width, p.channels, static_cast<T>(p.scale),
                 queries.data);
    fill(out.data, tile.rows * row_size, 0);
    fill(largest.data, tile.rows * kTileColumns, kNone);
    fill(total.data, tile.rows * kTileColumns, 0);
  }

  void run() {
    int64_t loaded = 0;
    for (int64_t n = 0; n < p.num_scales; ++n) {
      const RowLayout<T> candidates(pairing_of(p, n, false), tile);
      capacity = most(capacity, candidates.count);
      loaded = most(loaded, candidates.size(p.channels));
    }
    Buffer<T> moving_buffer(loaded), score_buffer(tile.rows * tile.vectors * capacity * lanes);
    moving = moving_buffer.data;
    scores = score_buffer.data;
    for (int64_t n = 0; n < p.num_scales; ++n) score_scale(n);
    merge();
    finish();
  }

  T* score(int64_t r, int64_t v, int64_t i) const {
    return scores + ((r * tile.vectors + v) * capacity + i) * lanes;
  }
  Interval rows_of(const Pairing& pairing, int64_t moving_row) const {
    const Interval rows =
        common(pairing.stationary_rows(moving_row), {tile.y, tile.y + tile.rows - 1});
    return {rows.first - tile.y, rows.last - tile.y};
  }

  void score_scale(int64_t n) {
    const AttentionScale& s = p.scales[n];
    const Pairing pairing = pairing_of(p, n, false);
    const Candidates<T> candidates(pairing, tile);
    const Addends<E> addends(p, n, head, pairing, tile, candidates);
    const int64_t begin = pairing.moving_rows(tile.y).first;
    const int64_t end = pairing.moving_rows(tile.y + tile.rows - 1).last;
    for (int64_t y = begin; y <= end; ++y) {
      const Interval rows = rows_of(pairing, y);
      if (rows.size() == 0) continue;
      bool full = kept_rows == kRowsKept;
      for (int64_t r = rows.first; r <= rows.last; ++r)
        full |= filled[r] + candidates.count > capacity;
      if (full) merge();
      kept[kept_rows++] = {n, y};
      const Moving<T> keys = candidates.load(token_row<E>(s.key, batch, kv_head, y * s.width),
                                             s.key.token, p.channels, T(1), moving);
      int64_t slots[kTileRows];
      for (int64_t r = rows.first; r <= rows.last; ++r) slots[r] = addends.slot(tile.y + r, y);
      const ScoreTile<T> score_tile = {queries.data, keys,      addends.table.data, slots,
                                       scores,       filled,    addends.stride,     tile.vectors,
                                       capacity,     p.channels};
      for_register_tiles<T>(rows, candidates, score_tile);
      for (int64_t r = rows.first; r <= rows.last; ++r) filled[r] += candidates.count;
    }
  }

  // Turns the scores kept so far into weights and adds their values to the output.
  void merge() {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t v = 0; v < tile.vectors; ++v) weigh(r, v);
    for (int64_t r = 0; r < tile.rows; ++r) filled[r] = 0;
    int64_t scale = -1;
    for (int64_t i = 0; i < kept_rows;) {
      scale = kept[i].scale;
      const AttentionScale& s = p.scales[scale];
      const Pairing pairing = pairing_of(p, scale, false);
      const Candidates<T> candidates(pairing, tile);
      for (; i < kept_rows && kept[i].scale == scale; ++i) {
        const Interval rows = rows_of(pairing, kept[i].row);
        const Moving<T> values =
            candidates.load(token_row<E>(s.value, batch, kv_head, kept[i].row * s.width),
                            s.value.token, p.channels, T(1), moving);
        const ValueTile<T> value_tile = {values,       scores,   filled,    out.data,
                                         tile.vectors, capacity, p.channels};
        for_register_tiles<T>(rows, candidates, value_tile);
        for (int64_t r = rows.first; r <= rows.last; ++r) filled[r] += candidates.count;
      }
    }
    for (int64_t r = 0; r < tile.rows; ++r) filled[r] = 0;
    kept_rows = 0;
    merged = true;
  }

  void weigh(int64_t r, int64_t v) {
    T* const old = largest.data + r * kTileColumns + v * lanes;
    T* const sum = total.data + r * kTileColumns + v * lanes;
    const Vec<T> before = load_vec(old);
    Vec<T> top = before;
    T* s = score(r, v, 0);
    for (int64_t i = 0; i < filled[r]; ++i) top = larger(load_vec(s + i * lanes), top);
    store_vec(old, top);
    // A lane that has seen nothing yet: any finite maximum keeps its weights at 0, not NaN.
    const Vec<T> base = where_seen(top, top, Vec<T>{});
    Vec<T> added{};
    for (int64_t i = 0; i < filled[r]; ++i) {
      const Vec<T> weight = exponential(load_vec(s + i * lanes) - base);
      store_vec(s + i * lanes, weight);
      added += weight;
    }
    if (!merged) return store_vec(sum, added);
    const Vec<T> decay = exponential(before - base);
    store_vec(sum, load_vec(sum) * decay + added);
    T* o = out.data + (r * tile.vectors + v) * p.channels * lanes;
    for (int64_t c = 0; c < p.channels; ++c)
      store_vec(o + c * lanes, load_vec(o + c * lanes) * decay);
  }

  void finish() {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t v = 0; v < tile.vectors; ++v) {
        const Vec<T> sum = load_vec(total.data + r * kTileColumns + v * lanes);
        const Vec<T> inverse = sum == 0 ? Vec<T>{} : 1 / sum;
        const Vec<T> top = load_vec(largest.data + r * kTileColumns + v * lanes);
        const Vec<T> lse = sum == 0 ? top : top + logarithm(sum);  // nothing seen: top is kNone
        store_vec(total.data + r * kTileColumns + v * lanes, lse);
        store_tile_vector<E>(tile, r, v, out.data, inverse, p.out, batch, head, p.width,
                             p.channels);
      }
      T* lse = static_cast<T*>(p.lse) + (batch * p.heads + head) * p.height * p.width +
               (tile.y + r) * p.width + tile.x;
      for (int64_t i = 0; i < tile.columns; ++i) lse[i] = total[r * kTileColumns + i];
    }
  }

  const LocalAttentionParams& p;
  int64_t batch, head, kv_head;
  Tile tile;
  int64_t capacity;  // scores kept per query
  int64_t row_size;
  Buffer<T> queries, out;    // [row][vector][channel][lane]
  Buffer<T> largest, total;  // [row][column]: the softmax's running maximum and sum
  T* moving = nullptr;
  T* scores = nullptr;  // [row][vector][score][lane]
  int64_t filled[kTileRows] = {};
  Kept kept[kRowsKept];
  int64_t kept_rows = 0;
  bool merged = false;
};

template <class E>
void forward(const LocalAttentionParams& p) {
  const Tiling tiling(p.height, p.width, p.channels);
  const int64_t tiles = tiling.count();
  parallel_for(p.batch * p.heads * tiles, threads_of(p), [&](int64_t i) {
    const Tile tile = tiling.at<typename Compute<E>::type>(i % tiles);
    Forward<E>(p, i / tiles / p.heads, i / tiles % p.heads, tile).run();
  });
}

}  // namespace

void local_attention(const LocalAttentionParams& p) {
  switch (p.type) {
    case FloatType::float32:
      return forward<float>(p);
    case FloatType::float64:
      return forward<double>(p);
    case FloatType::bfloat16:
      return forward<bfloat16>(p);
    case FloatType::float16:
      return forward<float16>(p);
  }
}

}  // namespace MSVQ_ISA
}  // namespace msvq
