// The geometry of the windows, and how a tile of stationary tokens meets the rows of moving ones.
//
// The forward and the query gradients hold queries still and move keys past them; the key gradients
// hold keys still and move queries. Both see intervals of rows and columns, so one code does both.
#pragma once
#include "local_attention/local_attention.h"
#include "local_attention/vectors.h"

namespace msvq {
namespace MSVQ_ISA {
namespace {

constexpr int64_t kTileRows = 8;      // stationary rows of a tile
constexpr int64_t kTileColumns = 64;  // its columns; a multiple of the lanes of every vector
constexpr int kChunk = 6;             // candidates of one register tile

struct Interval {
  int64_t first, last;  // inclusive; empty if last < first
  int64_t size() const { return most(0, last - first + 1); }
};
inline Interval common(Interval a, Interval b) {
  return {most(a.first, b.first), least(a.last, b.last)};
}

// One axis of one scale: `size` queries over `cells` keys.
struct Axis {
  int64_t size, cells, kernel;
  bool shift;

  int64_t cell(int64_t query) const { return ((2 * query + 1) * cells) / (2 * size); }
  Interval keys(int64_t query) const {
    const int64_t radius = kernel / 2, centre = cell(query);
    if (!shift) return {most(0, centre - radius), least(cells - 1, centre + radius)};
    const int64_t length = least(kernel, cells);
    const int64_t start = most(0, least(centre - radius, cells - length));
    return {start, start + length - 1};
  }
  // The queries whose window holds `key`: those with a centre in [low, high].
  Interval queries(int64_t key) const {
    const int64_t radius = kernel / 2, length = least(kernel, cells);
    int64_t low = key - radius, high = key + radius;
    if (shift && key < length) low = 0;
    if (shift && key >= cells - length) high = cells - 1;
    return {first_query(most(0, low)), least(size, first_query(high + 1)) - 1};
  }
  // The first query whose cell is at least `centre`: ceil((2 centre size - cells) / (2 cells)).
  int64_t first_query(int64_t centre) const {
    const int64_t above = 2 * centre * size - cells;
    return above <= 0 ? 0 : ceil_div(above, 2 * cells);
  }
};

// A scale seen from the stationary side.
struct Pairing {
  Axis y, x;
  bool by_key;  // keys are stationary and queries move
  bool own, raster, include_self;

  Interval moving_rows(int64_t row) const {
    Interval rows = by_key ? y.queries(row) : y.keys(row);
    if (own && raster) rows = by_key ? common(rows, {row, rows.last}) : common(rows, {0, row});
    return rows;
  }
  Interval stationary_rows(int64_t moving) const {
    Interval rows = by_key ? y.keys(moving) : y.queries(moving);
    if (own && raster)
      rows = by_key ? common(rows, {0, moving}) : common(rows, {moving, rows.last});
    return rows;
  }
  Interval columns(int64_t column) const { return by_key ? x.queries(column) : x.keys(column); }
  int64_t stationary_width() const { return by_key ? x.cells : x.size; }
  int64_t moving_width() const { return by_key ? x.size : x.cells; }
  // Whether candidate j of column x is column x - radius + j: then a row serves all j at once.
  bool contiguous() const { return own && !x.shift && x.kernel <= x.cells; }
};

inline Pairing pairing_of(const LocalAttentionParams& p, int64_t n, bool by_key) {
  const AttentionScale& s = p.scales[n];
  return {{p.height, s.height, s.kernel, p.shift},
          {p.width, s.width, s.kernel, p.shift},
          by_key,
          p.own && n == p.num_scales - 1,
          p.raster,
          p.include_self};
}

// A tile of stationary tokens; lanes past `columns` are idle.
struct Tile {
  int64_t y, rows, x, columns, vectors;
};
template <class T>
inline Tile tile_at(int64_t index, int64_t height, int64_t width) {
  const int64_t across = ceil_div(width, kTileColumns);
  const int64_t y = index / across * kTileRows, x = index % across * kTileColumns;
  const int64_t columns = least(kTileColumns, width - x);
  return {y, least(kTileRows, height - y), x, columns, ceil_div(columns, Simd<T>::lanes)};
}
inline int64_t tile_count(int64_t height, int64_t width) {
  return ceil_div(height, kTileRows) * ceil_div(width, kTileColumns);
}

// Which moving columns the lanes of a tile meet, and the loading of a moving row in that form.
struct Candidates {
  Candidates(const Pairing& pairing, const Tile& tile)
      : contiguous(pairing.contiguous()), count(0) {
    width = pairing.moving_width();
    for (int64_t i = 0; i < kTileColumns; ++i) {
      first[i] = length[i] = 0;
      if (i >= tile.columns) continue;
      const Interval columns = pairing.columns(tile.x + i);
      first[i] = columns.first;
      length[i] = columns.size();
      count = most(count, length[i]);
    }
    if (contiguous) count = pairing.x.kernel;
    origin = tile.x - count / 2;  // of a contiguous row
  }
  // The moving column of candidate j of lane i, or -1.
  int64_t column(int64_t i, int64_t j) const {
    if (!contiguous) return j < length[i] ? first[i] + j : -1;
    const int64_t c = origin + i + j;
    return length[i] > 0 && c >= 0 && c < width ? c : -1;
  }
  int64_t last_column(const Tile& tile) const {
    return first[tile.columns - 1] + length[tile.columns - 1] - 1;
  }
  template <class T>
  int64_t span(const Tile& tile) const {  // of one channel of a loaded row
    const int64_t lanes = Simd<T>::lanes, own = tile.vectors * lanes;
    return contiguous ? ceil_div(own + count - 1, lanes) * lanes : own;
  }
  template <class T>
  int64_t size(const Tile& tile, int64_t channels) const {
    return span<T>(tile) * channels * (contiguous ? 1 : count);
  }

  // Loads the tokens of one moving row, `stride` elements apart; outside the grid are zeros.
  template <class E, class T>
  Moving<T> load(const Tile& tile, const E* row, int64_t stride, int64_t channels, T factor,
                 T* out) const {
    constexpr int lanes = Simd<T>::lanes;
    const int64_t across = span<T>(tile);
    const E* tokens[lanes];
    // The next row is wanted next, and the caches' own prefetch does not look past a row.
    const int64_t begin = most(0, contiguous ? origin : first[0]);
    const int64_t end = least(width, contiguous ? origin + across : last_column(tile) + 1);
    const E* next = row + width * stride;
    for (int64_t c = begin; c < end; ++c)
      for (int64_t b = 0; b < channels; b += 64 / static_cast<int64_t>(sizeof(E)))
        __builtin_prefetch(next + c * stride + b);
    for (int64_t j = 0; j < (contiguous ? 1 : count); ++j) {
      for (int64_t i = 0; i < across; i += lanes) {
        for (int lane = 0; lane < lanes; ++lane) {
          const int64_t c = contiguous ? origin + i + lane : column(i + lane, j);
          tokens[lane] = c >= 0 && c < width ? row + c * stride : nullptr;
        }
        load_tokens<E>(tokens, channels, factor, out + j * channels * across + i, across);
      }
    }
    return {out, contiguous ? 1 : channels * across, across};
  }
  // The same for one number per token.
  template <class T>
  Moving<T> load_scalars(const Tile& tile, const T* row, T* out) const {
    const int64_t across = span<T>(tile);
    for (int64_t j = 0; j < (contiguous ? 1 : count); ++j) {
      for (int64_t i = 0; i < across; ++i) {
        const int64_t c = contiguous ? origin + i : column(i, j);
        out[j * across + i] = c >= 0 && c < width ? row[c] : T(0);
      }
    }
    return {out, contiguous ? 1 : across, across};
  }

  bool contiguous;
  int64_t count, width, origin;
  int64_t first[kTileColumns], length[kTileColumns];
};

// One thread where waking the others would take longer than the work.
inline int threads_of(const LocalAttentionParams& p) {
  int64_t pairs = 0;
  for (int64_t n = 0; n < p.num_scales; ++n) {
    const AttentionScale& s = p.scales[n];
    pairs += least(s.kernel, s.height) * least(s.kernel, s.width);
  }
  const int64_t work = p.batch * p.heads * p.height * p.width * pairs * p.channels;
  return work < (int64_t{1} << 20) ? 1 : p.threads;
}

inline int64_t bias_size(const LocalAttentionParams& p, const AttentionScale& s) {
  return s.bias == nullptr ? 0 : p.shift ? 2 * s.kernel - 1 : s.kernel;
}

// What is added to the scores of a tile: the bias, or `kNone` where a lane does not see a
// candidate. One table [candidate][lane] per row offset if there is a bias, else one for the own
// row and one for every other.
template <class E>
struct Addends {
  typedef typename Compute<E>::type T;

  Addends(const LocalAttentionParams& p, int64_t n, int64_t head, const Pairing& pairing_,
          const Tile& tile, const Candidates& candidates)
      : pairing(pairing_),
        size(bias_size(p, p.scales[n])),
        stride(candidates.count * kTileColumns),
        columns(size == 0 ? 0 : stride),
        table((size == 0 ? 2 : size) * stride) {
    const E* bias = static_cast<const E*>(p.scales[n].bias);
    for (int64_t slot = 0; slot < (size == 0 ? 2 : size); ++slot) {
      const bool own_row = pairing.own && slot == (size == 0 ? 1 : size / 2);
      for (int64_t j = 0; j < candidates.count; ++j) {
        for (int64_t i = 0; i < kTileColumns; ++i) {
          T& out = table[slot * stride + j * kTileColumns + i];
          out = kNone;
          const int64_t moving = candidates.column(i, j);
          if (moving < 0) continue;
          const int64_t still = tile.x + i;
          const int64_t key = pairing.by_key ? still : moving;
          const int64_t query = pairing.by_key ? moving : still;
          if (own_row && pairing.raster && key > query) continue;
          if (own_row && !pairing.include_self && key == query) continue;
          const int64_t offset = size == 0 ? 0 : key - pairing.x.cell(query) + size / 2;
          if (size != 0) columns[j * kTileColumns + i] = static_cast<int32_t>(offset);
          T value = 0;
          if (size != 0) widen_row(bias + (head * size + slot) * size + offset, &value, 1);
          out = value;
        }
      }
    }
  }
  int64_t slot(int64_t stationary, int64_t moving) const {
    if (size == 0) return pairing.own && stationary == moving ? 1 : 0;
    const int64_t key = pairing.by_key ? stationary : moving;
    const int64_t query = pairing.by_key ? moving : stationary;
    return key - pairing.y.cell(query) + size / 2;
  }

  Pairing pairing;
  int64_t size;  // of the bias along one axis, 0 without
  int64_t stride;
  Buffer<int32_t> columns;  // the bias column of [candidate][lane] where it is seen
  Buffer<T> table;
};

// Whether a lane sees its candidate, from the addend.
template <class V>
inline V where_seen(V addend, V value, V other) {
  return addend == static_cast<float>(kNone) ? other : value;
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};
// Calls f(Count<n>) for 1 <= n <= kMost.
template <int kMost, class F>
inline void with_count(int64_t n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_count<kMost - 1>(n, f);
  }
  f(Count<kMost>{});
}

// Covers rows x vectors x candidates with register tiles:
// f(Count<rows>, Count<candidates>, row, vector, candidate).
template <class T, class F>
inline void for_register_tiles(Interval rows, int64_t vectors, int64_t count, const F& f) {
  const int64_t blocks = ceil_div(rows.size(), Simd<T>::rows), chunks = ceil_div(count, kChunk);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r0 = rows.first + rows.size() * b / blocks;
    const int64_t r1 = rows.first + rows.size() * (b + 1) / blocks;
    with_count<Simd<T>::rows>(r1 - r0, [&](auto block) {
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t j0 = count * c / chunks, j1 = count * (c + 1) / chunks;
          with_count<kChunk>(j1 - j0, [&](auto chunk) { f(block, chunk, r0, v, j0); });
        }
    });
  }
}

template <class E>
inline const E* token_row(const TokenTensor& t, int64_t b, int64_t h, int64_t token) {
  return static_cast<const E*>(t.data) + b * t.batch + h * t.head + token * t.token;
}

// Loads a tile of stationary tokens as [row][vector][channel][lane].
template <class E, class T = typename Compute<E>::type>
inline void load_tile(const Tile& tile, const TokenTensor& t, int64_t b, int64_t h, int64_t width,
                      int64_t channels, T factor, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t v = 0; v < tile.vectors; ++v) {
      const E* tokens[lanes];
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t x = v * lanes + lane;
        tokens[lane] =
            x < tile.columns ? token_row<E>(t, b, h, (tile.y + r) * width + tile.x + x) : nullptr;
      }
      load_tokens<E>(tokens, channels, factor, out + (r * tile.vectors + v) * channels * lanes,
                     lanes);
    }
}

// Stores one vector of tokens of row r of a tile.
template <class E, class T = typename Compute<E>::type>
inline void store_tile_vector(const Tile& tile, int64_t r, int64_t v, const T* in, Vec<T> factor,
                              const TokenTensor& t, int64_t b, int64_t h, int64_t width,
                              int64_t channels) {
  constexpr int lanes = Simd<T>::lanes;
  E* tokens[lanes];
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t x = v * lanes + lane;
    tokens[lane] = x < tile.columns
                       ? const_cast<E*>(token_row<E>(t, b, h, (tile.y + r) * width + tile.x + x))
                       : nullptr;
  }
  store_tokens<E>(in + (r * tile.vectors + v) * channels * lanes, channels, factor, tokens);
}

}  // namespace
}  // namespace MSVQ_ISA
}  // namespace msvq
