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

constexpr int64_t kTileRows = 16;     // most stationary rows of a tile
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
  int64_t moving_width() const { return by_key ? x.size : x.cells; }
  // Whether the windows of neighbouring columns are one pattern, moved: then lanes share loads.
  bool regular() const { return !x.shift && x.size % x.cells == 0 && x.kernel <= x.cells; }
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
// The tiles of a plane. Tall ones load fewer moving rows twice; wide tokens must fit the cache.
struct Tiling {
  Tiling(int64_t height_, int64_t width_, int64_t channels)
      : height(height_),
        width(width_),
        rows(most(4, least(kTileRows, 512 / channels))),
        across(ceil_div(width_, kTileColumns)) {}
  int64_t count() const { return ceil_div(height, rows) * across; }
  template <class T>
  Tile at(int64_t index) const {
    const int64_t y = index / across * rows, x = index % across * kTileColumns;
    const int64_t columns = least(kTileColumns, width - x);
    return {y, least(rows, height - y), x, columns, ceil_div(columns, Simd<T>::lanes)};
  }

  int64_t height, width, rows, across;
};

// Which moving columns the lanes of a tile meet, and how a moving row is loaded for them.
//
// A loaded row is planes of `per_plane` candidates, in which candidate j of lane i lies at place
// i + j * step. Where the windows are regular with ratio R of the grids, lanes share what is
// loaded: keys past queries are one plane with step R (each key R times), queries past keys are R
// planes with step 1 (one per place in a cell). Elsewhere every candidate is loaded for every lane.
template <class T>
struct RowLayout {
  static constexpr int64_t lanes = Simd<T>::lanes;

  RowLayout(const Pairing& pairing_, const Tile& tile_)
      : pairing(pairing_), tile(tile_), regular(pairing_.regular()), across(tile.vectors * lanes) {
    if (regular) {
      ratio = pairing.x.size / pairing.x.cells;
      planes = pairing.by_key ? ratio : 1;
      per_plane = pairing.x.kernel;
      step = pairing.by_key ? 1 : ratio;
      across = ceil_div(across + (per_plane - 1) * step, lanes) * lanes;
    } else {
      for (int64_t i = 0; i < tile.columns; ++i)
        per_plane = most(per_plane, pairing.columns(tile.x + i).size());
    }
    count = planes * per_plane;
    blocks = regular ? planes : count;
  }
  // The moving column of candidate j of lane i, or -1.
  int64_t column(int64_t i, int64_t j) const {
    if (i >= tile.columns) return -1;
    return regular ? source(i + j % per_plane * step, j / per_plane) : source(i, j);
  }
  // The moving column at place i of block b of a loaded row, or -1.
  int64_t source(int64_t i, int64_t b) const {
    const int64_t x = tile.x + i;
    if (!regular) {
      if (i >= tile.columns) return -1;
      const Interval seen = pairing.columns(x);
      return b < seen.size() ? seen.first + b : -1;
    }
    const int64_t radius = per_plane / 2;
    const int64_t c = pairing.by_key ? (x - radius) * ratio + b : x / ratio - radius;
    return c >= 0 && c < pairing.moving_width() ? c : -1;
  }
  int64_t size(int64_t channels) const { return blocks * across * channels; }
  Moving<T> moving(T* data, int64_t channels) const {
    return {data, regular ? step : channels * across, across, per_plane, channels * across};
  }

  Pairing pairing;
  Tile tile;
  bool regular;
  int64_t across;  // places of a block of a loaded row
  int64_t ratio = 1, planes = 1, per_plane = 0, step = 0, count, blocks;
};

// A layout with the moving column of each place looked up once.
template <class T>
struct Candidates : RowLayout<T> {
  using RowLayout<T>::across;
  using RowLayout<T>::blocks;
  using RowLayout<T>::lanes;
  using RowLayout<T>::pairing;
  using RowLayout<T>::tile;

  Candidates(const Pairing& pairing_, const Tile& tile_)
      : RowLayout<T>(pairing_, tile_), sources(this->size(1)) {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < across; ++i)
        sources[b * across + i] = static_cast<int32_t>(this->source(i, b));
  }

  // Loads the tokens of one moving row, `stride` elements apart; outside the grid are zeros.
  template <class E>
  Moving<T> load(const E* row, int64_t stride, int64_t channels, T factor, T* out) const {
    // The next row is wanted next, and the caches' own prefetch does not look past a row.
    const E* next = row + pairing.moving_width() * stride;
    const int64_t end = pairing.columns(tile.x + tile.columns - 1).last;
    for (int64_t c = pairing.columns(tile.x).first; c <= end; ++c)
      for (int64_t b = 0; b < channels; b += 64 / static_cast<int64_t>(sizeof(E)))
        __builtin_prefetch(next + c * stride + b);
    const E* tokens[lanes];
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < across; i += lanes) {
        const int32_t* from = sources.data + b * across + i;
        for (int lane = 0; lane < lanes; ++lane)
          tokens[lane] = from[lane] >= 0 ? row + from[lane] * stride : nullptr;
        load_tokens<E>(tokens, channels, factor, out + b * channels * across + i, across);
      }
    }
    return this->moving(out, channels);
  }
  // The same for one number per token.
  Moving<T> load_scalars(const T* row, T* out) const {
    for (int64_t i = 0; i < blocks * across; ++i) out[i] = sources[i] >= 0 ? row[sources[i]] : T(0);
    return this->moving(out, 1);
  }

  Buffer<int32_t> sources;
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
          const Tile& tile, const RowLayout<typename Compute<E>::type>& candidates)
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

// Covers rows x vectors x candidates with register tiles, none across two planes:
// f(Count<rows>, Count<candidates>, row, vector, candidate).
template <class T, class F>
inline void for_register_tiles(Interval rows, const RowLayout<T>& candidates, const F& f) {
  const int64_t vectors = candidates.tile.vectors, count = candidates.per_plane;
  const int64_t blocks = ceil_div(rows.size(), Simd<T>::rows), chunks = ceil_div(count, kChunk);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r0 = rows.first + rows.size() * b / blocks;
    const int64_t r1 = rows.first + rows.size() * (b + 1) / blocks;
    with_count<Simd<T>::rows>(r1 - r0, [&](auto block) {
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t i = 0; i < candidates.planes * chunks; ++i) {
          const int64_t plane = i / chunks, c = i % chunks;
          const int64_t j0 = count * c / chunks, j1 = count * (c + 1) / chunks;
          with_count<kChunk>(j1 - j0,
                             [&](auto chunk) { f(block, chunk, r0, v, plane * count + j0); });
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
