// The gradients of local attention on the CPU.
//
// With weights P = exp(S - LSE), dP = dO·V and delta = dO·O:
//   dS = P (dP - delta),  dQ = scale dS K,  dK = dS^T (scale Q),  dV = P^T dO,  dbias = sums of dS.
// One pass owns tiles of queries (dQ, dbias, delta), a second owns tiles of keys of every scale
// (dK, dV); each recomputes the weights. No two tasks write the same number, and every sum has one
// order.
#include "local_attention/local_attention.h"
#include "local_attention/vectors.h"
#include "local_attention/windows.h"
#include "parallel.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

// The arguments of the register tiles, free of the element type so that all share their code.
template <class T, bool kByKey>
struct GradTile {
  const T *first, *second;  // stationary tiles as load_tile makes them
  Moving<T> a, b;           // their moving partners
  T *grad_first, *grad_second;
  const T* addends;
  const int64_t* slots;          // of each row's addends
  Moving<T> the_lse, the_delta;  // by candidate if queries move, else [row][column] of the tile
  T* offsets;                    // sums of dS laid out as `addends`, or null
  int64_t stride, vectors, channels;

  template <class R, class J>
  void operator()(R, J, int64_t r0, int64_t v, int64_t j0) const {
    constexpr int lanes = Simd<T>::lanes, kR = R::value, kJ = J::value;
    const int64_t row = vectors * channels * lanes, at = (r0 * vectors + v) * channels * lanes;
    const T* a_data = a.at(j0) + v * lanes;
    const T* b_data = b.at(j0) + v * lanes;
    Vec<T> weight[kR][kJ], grad[kR][kJ];
    dots<T, kR, kJ>(first + at, row, a_data, a, channels, weight);
    dots<T, kR, kJ>(second + at, row, b_data, b, channels, grad);
    const T* lse_data = (kByKey ? the_lse.at(j0) : the_lse.data) + v * lanes;
    const T* delta_data = (kByKey ? the_delta.at(j0) : the_delta.data) + v * lanes;
    for (int r = 0; r < kR; ++r) {
      const int64_t offset = slots[r0 + r] * stride + j0 * kTileColumns + v * lanes;
#pragma GCC unroll 6
      for (int j = 0; j < kJ; ++j) {
        const int64_t from = kByKey ? j * the_lse.candidate : (r0 + r) * kTileColumns;
        const Vec<T> add = load_vec(addends + offset + j * kTileColumns);
        const Vec<T> power = exponential(weight[r][j] + add - load_vec(lse_data + from));
        weight[r][j] = where_seen(add, power, Vec<T>{});
        grad[r][j] = weight[r][j] * (grad[r][j] - load_vec(delta_data + from));
        if constexpr (!kByKey) {
          if (offsets == nullptr) continue;
          T* sum = offsets + offset + j * kTileColumns;
          store_vec(sum, load_vec(sum) + grad[r][j]);
        }
      }
    }
    accumulate<T, kR, kJ>(grad, a_data, a, channels, grad_first + at, row);
    if constexpr (kByKey) accumulate<T, kR, kJ>(weight, b_data, b, channels, grad_second + at, row);
  }
};

// A tile of stationary tokens and its two gradients, `mine` and `theirs` being (Q, dO), (K, V) when
// queries are stationary and the other way round when keys are.
template <class E, bool kByKey>
struct Backward {
  typedef typename Compute<E>::type T;
  static constexpr int lanes = Simd<T>::lanes;

  Backward(const LocalAttentionParams& p_, int64_t batch_, const Tile& tile_)
      : p(p_),
        batch(batch_),
        tile(tile_),
        row_size(tile.vectors * p.channels * lanes),
        first(tile.rows * row_size),
        second(tile.rows * row_size),
        grad_first(tile.rows * row_size),
        grad_second(kByKey ? tile.rows * row_size : 0) {
    fill(grad_first.data, tile.rows * row_size, 0);
    if (kByKey) fill(grad_second.data, tile.rows * row_size, 0);
  }

  // Adds what the moving rows of scale n under query head `head` send to the tile. `lse` and
  // `delta` are the queries' numbers, of the tile or of the whole plane if queries move; grad_bias,
  // if any, is (b, b) sums of the tile.
  void add_scale(int64_t n, int64_t head, const T* lse, const T* delta, T* grad_bias) {
    const AttentionScale& s = p.scales[n];
    const int64_t kv_head = head * p.kv_heads / p.heads;
    const Pairing pairing = pairing_of(p, n, kByKey);
    const Candidates<T> candidates(pairing, tile);
    const Addends<E> addends(p, n, head, pairing, tile, candidates);
    const int64_t size = candidates.size(p.channels);
    const int64_t scalars = kByKey ? candidates.size(1) : 0;
    Buffer<T> theirs(2 * size), numbers(2 * scalars);
    Buffer<T> offsets(grad_bias == nullptr ? 0 : addends.size * addends.stride);
    if (grad_bias != nullptr) fill(offsets.data, addends.size * addends.stride, 0);
    T* const offsets_or_null = grad_bias == nullptr ? nullptr : offsets.data;
    const TokenTensor& one = kByKey ? p.q : s.key;
    const TokenTensor& two = kByKey ? p.grad_out : s.value;
    const int64_t moving_head = kByKey ? head : kv_head, width = pairing.moving_width();
    const int64_t begin = pairing.moving_rows(tile.y).first;
    const int64_t end = pairing.moving_rows(tile.y + tile.rows - 1).last;
    for (int64_t y = begin; y <= end; ++y) {
      Interval rows = common(pairing.stationary_rows(y), {tile.y, tile.y + tile.rows - 1});
      if (rows.size() == 0) continue;
      rows = {rows.first - tile.y, rows.last - tile.y};
      const Moving<T> a =
          candidates.load(token_row<E>(one, batch, moving_head, y * width), one.token, p.channels,
                          kByKey ? static_cast<T>(p.scale) : T(1), theirs.data);
      const Moving<T> b = candidates.load(token_row<E>(two, batch, moving_head, y * width),
                                          two.token, p.channels, T(1), theirs.data + size);
      Moving<T> the_lse{const_cast<T*>(lse), 0, 0, 1, 0};
      Moving<T> the_delta{const_cast<T*>(delta), 0, 0, 1, 0};
      if (kByKey) {
        the_lse = candidates.load_scalars(lse + y * width, numbers.data);
        the_delta = candidates.load_scalars(delta + y * width, numbers.data + scalars);
      }
      int64_t slots[kTileRows];
      for (int64_t r = rows.first; r <= rows.last; ++r) slots[r] = addends.slot(tile.y + r, y);
      const GradTile<T, kByKey> grad_tile = {
          first.data,         second.data, a,       b,         grad_first.data, grad_second.data,
          addends.table.data, slots,       the_lse, the_delta, offsets_or_null, addends.stride,
          tile.vectors,       p.channels};
      for_register_tiles<T>(rows, candidates, grad_tile);
    }
    if (grad_bias == nullptr) return;
    fill(grad_bias, addends.size * addends.size, 0);
    for (int64_t slot = 0; slot < addends.size; ++slot)
      for (int64_t k = 0; k < addends.stride; ++k)
        if (addends.table[slot * addends.stride + k] != T(kNone))
          grad_bias[slot * addends.size + addends.columns[k]] += offsets[slot * addends.stride + k];
  }

  const LocalAttentionParams& p;
  int64_t batch;
  Tile tile;
  int64_t row_size;
  Buffer<T> first, second, grad_first, grad_second;  // [row][vector][channel][lane]
};

// dQ of a tile of queries, its delta, and its part of the bias gradients (scale after scale).
template <class E, class T = typename Compute<E>::type>
void query_tile(const LocalAttentionParams& p, int64_t batch, int64_t head, const Tile& tile,
                T* delta, T* grad_bias) {
  constexpr int lanes = Simd<T>::lanes;
  Backward<E, false> task(p, batch, tile);
  const int64_t plane = (batch * p.heads + head) * p.height * p.width;
  const int64_t numbers = tile.rows * kTileColumns;
  Buffer<T> tile_lse(numbers), tile_delta(numbers);
  fill(tile_lse.data, numbers, 0);
  load_tile<E>(tile, p.grad_out, batch, head, p.width, p.channels, T(1), task.second.data);
  load_tile<E>(tile, p.out, batch, head, p.width, p.channels, T(1), task.first.data);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t place = plane + (tile.y + r) * p.width + tile.x;
    for (int64_t v = 0; v < tile.vectors; ++v) {
      const int64_t at = (r * tile.vectors + v) * p.channels * lanes;
      Vec<T> sum{};
      for (int64_t c = 0; c < p.channels; ++c)
        sum += load_vec(task.first.data + at + c * lanes) *
               load_vec(task.second.data + at + c * lanes);
      store_vec(tile_delta.data + r * kTileColumns + v * lanes, sum);
    }
    for (int64_t i = 0; i < tile.columns; ++i) {
      tile_lse[r * kTileColumns + i] = static_cast<const T*>(p.lse)[place + i];
      delta[place + i] = tile_delta[r * kTileColumns + i];
    }
  }
  load_tile<E>(tile, p.q, batch, head, p.width, p.channels, static_cast<T>(p.scale),
               task.first.data);
  for (int64_t n = 0; n < p.num_scales; ++n) {
    const int64_t b = bias_size(p, p.scales[n]);
    task.add_scale(n, head, tile_lse.data, tile_delta.data, b == 0 ? nullptr : grad_bias);
    grad_bias += b * b;
  }
  const Vec<T> factor = splat(static_cast<T>(p.scale));
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t v = 0; v < tile.vectors; ++v)
      store_tile_vector<E>(tile, r, v, task.grad_first.data, factor, p.grad_q, batch, head, p.width,
                           p.channels);
}

// dK and dV of a tile of keys of scale n, summed over the query heads that read it.
template <class E, class T = typename Compute<E>::type>
void key_tile(const LocalAttentionParams& p, int64_t n, int64_t batch, int64_t kv_head,
              const Tile& tile, const T* delta) {
  const AttentionScale& s = p.scales[n];
  Backward<E, true> task(p, batch, tile);
  load_tile<E>(tile, s.key, batch, kv_head, s.width, p.channels, T(1), task.first.data);
  load_tile<E>(tile, s.value, batch, kv_head, s.width, p.channels, T(1), task.second.data);
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t plane = (batch * p.heads + head) * p.height * p.width;
    task.add_scale(n, head, static_cast<const T*>(p.lse) + plane, delta + plane, nullptr);
  }
  const Vec<T> one = splat(T(1));
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t v = 0; v < tile.vectors; ++v) {
      store_tile_vector<E>(tile, r, v, task.grad_first.data, one, s.grad_key, batch, kv_head,
                           s.width, p.channels);
      store_tile_vector<E>(tile, r, v, task.grad_second.data, one, s.grad_value, batch, kv_head,
                           s.width, p.channels);
    }
}

template <class E>
void backward(const LocalAttentionParams& p) {
  typedef typename Compute<E>::type T;
  const Tiling tiling(p.height, p.width, p.channels);
  const int64_t tiles = tiling.count();
  int64_t bias_total = 0;
  for (int64_t n = 0; n < p.num_scales; ++n) {
    const int64_t b = bias_size(p, p.scales[n]);
    bias_total += b * b;
  }
  Buffer<T> delta(p.batch * p.heads * p.height * p.width);
  Buffer<T> parts(p.batch * p.heads * tiles * bias_total);  // of the bias gradients, by tile
  parallel_for(p.batch * p.heads * tiles, threads_of(p), [&](int64_t i) {
    query_tile<E>(p, i / tiles / p.heads, i / tiles % p.heads, tiling.at<T>(i % tiles), delta.data,
                  parts.data + i * bias_total);
  });
  int64_t offset = 0, key_tasks = 0;
  for (int64_t n = 0; n < p.num_scales; ++n) {
    const AttentionScale& s = p.scales[n];
    const int64_t size = bias_size(p, s) * bias_size(p, s);
    for (int64_t i = 0; i < p.heads * size; ++i) {
      double sum = 0;
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t t = 0; t < tiles; ++t)
          sum += parts[((b * p.heads + i / size) * tiles + t) * bias_total + offset + i % size];
      const T rounded = static_cast<T>(sum);
      narrow_row(&rounded, static_cast<E*>(s.grad_bias) + i, 1);
    }
    offset += size;
    key_tasks += p.batch * p.kv_heads * Tiling(s.height, s.width, p.channels).count();
  }
  parallel_for(key_tasks, threads_of(p), [&](int64_t i) {
    for (int64_t n = 0; n < p.num_scales; ++n) {
      const AttentionScale& s = p.scales[n];
      const Tiling key_tiling(s.height, s.width, p.channels);
      const int64_t planes = p.batch * p.kv_heads, key_tiles = key_tiling.count();
      if (i < planes * key_tiles) {
        return key_tile<E>(p, n, i / key_tiles / p.kv_heads, i / key_tiles % p.kv_heads,
                           key_tiling.at<T>(i % key_tiles), delta.data);
      }
      i -= planes * key_tiles;
    }
  });
}

}  // namespace

void local_attention_backward(const LocalAttentionParams& p) {
  switch (p.type) {
    case FloatType::float32:
      return backward<float>(p);
    case FloatType::float64:
      return backward<double>(p);
    case FloatType::bfloat16:
      return backward<bfloat16>(p);
    case FloatType::float16:
      return backward<float16>(p);
  }
}

}  // namespace MSVQ_ISA
}  // namespace msvq
