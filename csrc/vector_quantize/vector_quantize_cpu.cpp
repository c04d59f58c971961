// Vector quantization on the CPU: see vector_quantize.h.
#include "parallel.h"
#include "vector_quantize/rows.h"
#include "vector_quantize/search.h"
#include "vector_quantize/vector_quantize.h"

namespace msvq {
namespace MSVQ_ISA {

namespace {

constexpr int64_t kSkipped = -1;  // marks a non-finite row until the statistics are done

int64_t unmarked(int64_t code) { return code == kSkipped ? 0 : code; }

// Centres and scales rows whose d are neighbours, negated; the squares of their norms.
template <class T>
void load_rows(const Rows<const T>& z, int64_t row, const PackedCodes& codes, Block* block,
               float* square) {
  const int64_t width = codes.width;
  const float scale = -codes.scale;
  z.runs(row, block->count, [&](int64_t first, int64_t run, const T* p) {
    for (int64_t i = first; i < first + run; ++i, p += z.strides.inner) {
      float* x = &block->x[i * width];
      const float* values = widened(p, width, x);
      vfloat sum = {};
      int64_t d = 0;
      for (; d + kLanes <= width; d += kLanes) {
        const vfloat v = (load(values + d) - load(&codes.mean[d])) * scale;
        store(x + d, v);
        sum += v * v;
      }
      square[i] = horizontal_sum(sum);
      for (; d < width; ++d) {
        x[d] = (values[d] - codes.mean[d]) * scale;
        square[i] += x[d] * x[d];
      }
    }
  });
}

// The same for rows that are neighbours of each other.
template <class T>
void load_columns(const Rows<const T>& z, int64_t row, const PackedCodes& codes, Block* block,
                  float* square) {
  const float scale = -codes.scale;
  for (int64_t d = 0; d < codes.width; ++d) {
    float* x = &block->x[d * kBlockRows];
    read_column(z, row, block->count, d, x);
    for (int64_t i = block->count; i < kBlockRows; ++i) x[i] = 0;
    for (int64_t i = 0; i < kBlockRows; ++i) {
      x[i] = (x[i] - codes.mean[d]) * scale;
      square[i] += x[i] * x[i];
    }
  }
}

// Reads the rows from `row` as the filter takes them and bounds their norms and errors.
template <class T>
void load_block(const Rows<const T>& z, int64_t row, const PackedCodes& codes, Block* block) {
  const int64_t width = codes.width;
  float square[kBlockRows] = {};
  block->by_row = z.by_row();
  if (z.by_row()) {
    load_rows(z, row, codes, block, square);
  } else {
    load_columns(z, row, codes, block, square);
  }
  // The margins cover the rounding of the sums of squares and the squares that underflow.
  for (int64_t i = 0; i < kBlockRows; ++i)
    block->norm[i] = __builtin_sqrtf(square[i]) * 1.001f + 1e-17f;
#if defined(__AVX512F__)
  if (codes.filter == Filter::int16) {
    Int16Rows* const rows = &block->integers;
    bound_rows(codes, block->norm, rows);
    if (!z.by_row()) return narrow_columns_to_pairs(block->x.data, width, rows);
    for (int64_t i = 0; i < block->count; ++i)
      narrow_row_to_pairs(&block->x[i * width], rows->factor[i], width,
                          &rows->pair[i * pairs(width)]);
    return;
  }
#endif
  const float error = static_cast<float>(codes.dot_error * 1.001);
  const float most = static_cast<float>(codes.max_norm * 1.001), wide = static_cast<float>(width);
  for (int64_t i = 0; i < kBlockRows; ++i) {
    block->error_norm[i] = -(error * block->norm[i] + 1e-17f);
    const float both = block->norm[i] + most;
    block->margin[i] =
        (wide + 9) * 0x1p-52f * both * both + 9 * (wide + 4) * 0x1p-126f * (1 + block->norm[i]);
  }
#ifdef MSVQ_AMX
  if (codes.filter == Filter::split) {
    const SplitRows split{block->hi.data, block->lo.data};
    if (!z.by_row()) return split_columns(block->x.data, width, block->count, split);
    for (int64_t i = 0; i < block->count; ++i) split_row(&block->x[i * width], width, i, split);
  }
#endif
}

bool all_finite(const float* x, int64_t width) {
  bool finite = true;
  for (int64_t d = 0; d < width; ++d) finite &= x[d] - x[d] == 0.0f;
  return finite;
}

// Returns how many rows were scored again.
template <class T>
int64_t search_block(const Rows<const T>& z, int64_t row, const float* codebook,
                     const PackedCodes& codes, Block* block, int64_t* out) {
  load_block(z, row, codes, block);
  block->ahead = block_ahead(z, row + kBlockRows, codes.width);
  scan(block, codes);
  int64_t open[kBlockRows];
  double limits[kBlockRows];
  const int64_t opened = find_open_rows(*block, codes, out, open, limits);
  int64_t again = 0;
  for (int64_t j = 0; j < opened; ++j) {
    const int64_t i = open[j];
    read_row(z, row + i, codes.width, block->z_row.data);
    const bool finite =
        block->norm[i] < __builtin_inff() || all_finite(block->z_row.data, codes.width);
    out[i] = finite ? resolve(block, i, limits[i], codebook, codes, &again) : kSkipped;
  }
  return again;
}

// Writes z_q of a block and returns its sum of (z - e)^2.
template <class T>
float write_block(const Rows<const T>& z, const Rows<T>& z_q, int64_t row, int64_t count,
                  const float* codebook, const int64_t* codes, int64_t width, float* scratch) {
  vfloat sum = {};
  float rest = 0;
  if (z.by_row()) {
    for (int64_t i = 0; i < count; ++i) {
      const float* e = codebook + codes[i] * width;
      widen_row(z.at(row + i), scratch, width);
      int64_t d = 0;
      for (; d + kLanes <= width; d += kLanes) {
        const vfloat difference = load(scratch + d) - load(e + d);
        sum += difference * difference;
      }
      for (; d < width; ++d) rest += (scratch[d] - e[d]) * (scratch[d] - e[d]);
      narrow_row(e, z_q.at(row + i), width);
    }
  } else {
    float column[kBlockRows];
    gather_columns(codebook, codes, count, width, scratch);
    for (int64_t d = 0; d < width; ++d) {
      const float* e = scratch + d * kBlockRows;
      read_column(z, row, count, d, column);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        const vfloat difference = load(column + i) - load(e + i);
        sum += difference * difference;
      }
      for (; i < count; ++i) rest += (column[i] - e[i]) * (column[i] - e[i]);
      write_column(z_q, row, count, d, e);
    }
  }
  return horizontal_sum(sum) + rest;
}

// Sums over the rows of every code, in order of the rows: one task owns a range of codes and of d,
// so that neither the thread count nor a popular code changes the order or the balance of work.
template <class T>
void add_statistics(const VectorQuantizeParams& p, const Rows<const T>& z, int64_t rows) {
  constexpr int64_t kSlice = 16;
  const int64_t width = p.width, slices = (width + kSlice - 1) / kSlice;
  int64_t ranges = (p.threads + slices - 1) / slices;
  ranges = ranges < p.num_codes ? ranges : p.num_codes;
  parallel_for(slices * ranges, p.threads, [&](int64_t task) {
    const int64_t d0 = task % slices * kSlice, range = task / slices;
    const int64_t size = width - d0 < kSlice ? width - d0 : kSlice;
    const int64_t low = p.num_codes * range / ranges, high = p.num_codes * (range + 1) / ranges;
    for (int64_t k = low; k < high; ++k)
      for (int64_t d = d0; d < d0 + size; ++d) p.sums[k * width + d] = 0;
    float x[kBlockRows * kSlice];
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
      if (!z.by_row()) {
        float column[kBlockRows];
        for (int64_t d = 0; d < size; ++d) {
          read_column(z, row, count, d0 + d, column);
          for (int64_t i = 0; i < count; ++i) x[i * kSlice + d] = column[i];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t code = p.codes[row + i];
        if (code < low || code >= high) continue;  // also rows that are skipped
        float* sum = p.sums + code * width + d0;
        float* value = x + i * kSlice;
        if (z.by_row()) widen_row(z.at(row + i) + d0, value, size);
        if (size == kSlice) {
          for (int64_t d = 0; d < kSlice; ++d) sum[d] += value[d];
        } else {
          for (int64_t d = 0; d < size; ++d) sum[d] += value[d];
        }
        if (d0 == 0) ++p.counts[code];
      }
    }
  });
}

// Codes, and with `sums` z_q and the squared error of every block; false where integers leave too
// much open, which only the rows show: those far shorter than codes of one length, for example.
template <class T>
bool search(const VectorQuantizeParams& p, [[maybe_unused]] Filter best, float* panels,
            double* errors) {
  const int64_t rows = p.outer * p.inner, width = p.width;
  const Rows<const T> z{static_cast<const T*>(p.z), p.z_strides, p.inner};
  const Rows<T> z_q{static_cast<T*>(p.z_q), p.z_q_strides, p.inner};
  Filter filter = Filter::float32;
#ifdef MSVQ_AMX
  if (best == Filter::split && width % 32 == 0 && amx_available()) filter = Filter::split;
#endif
  bool integers = false;
#if defined(__AVX512F__)
  integers = filter == Filter::float32 && best != filter && int16_products_available();
#endif
  PackedCodes codes(p.num_codes, width, panels, filter, integers);
  pack(p.codebook, p.num_codes, p.threads, &codes);
#if defined(__AVX512F__)
  if (integers && codes.count > 0) narrow_panels(p.threads, &codes);
#endif

  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  // Long enough that most blocks were asked for by the one before.
  const int64_t share = blocks / (4 * p.threads), task_blocks = share < 1    ? 1
                                                                : share > 16 ? 16
                                                                             : share;
  int64_t scored_again = 0;
  bool given_up = false;
  parallel_for((blocks + task_blocks - 1) / task_blocks, p.threads, [&](int64_t task) {
    Block block(codes);
    for (int64_t b = task * task_blocks; b < blocks && b < (task + 1) * task_blocks; ++b) {
      const int64_t row = b * kBlockRows;
      const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
      int64_t* out = p.codes + row;
      block.count = count;
      if (codes.count == 0) {
        for (int64_t i = 0; i < count; ++i) {
          read_row(z, row + i, width, block.z_row.data);
          out[i] = all_finite(block.z_row.data, width) ? 0 : kSkipped;
        }
      } else {
        if (__atomic_load_n(&given_up, __ATOMIC_RELAXED)) return;
        const int64_t again = search_block(z, row, p.codebook, codes, &block, out);
        const int64_t all = __atomic_add_fetch(&scored_again, again, __ATOMIC_RELAXED);
        // A row scored again takes as long as some ten others.
        if (codes.filter == Filter::int16 && again > count / 8 && all > rows / 64)
          __atomic_store_n(&given_up, true, __ATOMIC_RELAXED);
      }
      if (p.sums == nullptr) {
        for (int64_t i = 0; i < count; ++i) out[i] = unmarked(out[i]);
        continue;
      }
      int64_t known[kBlockRows];
      for (int64_t i = 0; i < count; ++i) known[i] = unmarked(out[i]);
      errors[b] = write_block(z, z_q, row, count, p.codebook, known, width, block.x.data);
    }
  });
  return !given_up;
}

template <class T>
void quantize(const VectorQuantizeParams& p) {
  const int64_t rows = p.outer * p.inner, blocks = (rows + kBlockRows - 1) / kBlockRows;
  // The packed codes live where the sums will be: neither needs the room while the other does.
  const int64_t slots = PackedCodes::slots(p.num_codes);
  Scratch<float> own_panels(p.sums == nullptr ? slots * p.width : 0);
  Scratch<double> errors(p.sums == nullptr ? 0 : blocks);
  float* const panels = p.sums == nullptr ? own_panels.data : p.sums;
  if (!search<T>(p, p.filter, panels, errors.data))
    search<T>(p, Filter::float32, panels, errors.data);
  if (p.sums == nullptr) return;
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += errors[b];
  *p.squared_error = total;
  for (int64_t k = 0; k < p.num_codes; ++k) p.counts[k] = 0;
  add_statistics(p, Rows<const T>{static_cast<const T*>(p.z), p.z_strides, p.inner}, rows);
  for (int64_t i = 0; i < rows; ++i) p.codes[i] = unmarked(p.codes[i]);
}

template <class T>
void backward(const VectorQuantizeBackwardParams& p) {
  const int64_t rows = p.outer * p.inner, width = p.width;
  const Rows<const T> z{static_cast<const T*>(p.z), p.strides, p.inner};
  const Rows<const T> grad_z_q{static_cast<const T*>(p.grad_z_q), p.strides, p.inner};
  const Rows<T> grad_z{static_cast<T*>(p.grad_z), p.strides, p.inner};
  const bool through = p.grad_z_q != nullptr;
  constexpr int64_t kTask = 4;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  parallel_for((blocks + kTask - 1) / kTask, p.threads, [&](int64_t task) {
    const int64_t length = z.by_row() ? width : kBlockRows;
    Scratch<float> columns(z.by_row() ? 0 : kBlockRows * width), x(length), grad(length);
    for (int64_t i = 0; i < length; ++i) grad[i] = 0;
    const auto combine = [&](const float* e, int64_t n) {
      for (int64_t i = 0; i < n; ++i) x[i] = grad[i] + p.scale * (x[i] - e[i]);
    };
    for (int64_t b = task * kTask; b < blocks && b < (task + 1) * kTask; ++b) {
      const int64_t row = b * kBlockRows;
      const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
      if (z.by_row()) {
        for (int64_t i = row; i < row + count; ++i) {
          widen_row(z.at(i), x.data, width);
          if (through) widen_row(grad_z_q.at(i), grad.data, width);
          combine(p.codebook + p.codes[i] * width, width);
          narrow_row(x.data, grad_z.at(i), width);
        }
      } else {
        gather_columns(p.codebook, p.codes + row, count, width, columns.data);
        for (int64_t d = 0; d < width; ++d) {
          read_column(z, row, count, d, x.data);
          if (through) read_column(grad_z_q, row, count, d, grad.data);
          combine(&columns[d * kBlockRows], count);
          write_column(grad_z, row, count, d, x.data);
        }
      }
    }
  });
}

}  // namespace

void vector_quantize(const VectorQuantizeParams& p) {
  if (p.type == LatentType::float32) return quantize<float>(p);
  if (p.type == LatentType::float16) return quantize<float16>(p);
  quantize<bfloat16>(p);
}

void vector_quantize_backward(const VectorQuantizeBackwardParams& p) {
  if (p.type == LatentType::float32) return backward<float>(p);
  if (p.type == LatentType::float16) return backward<float16>(p);
  backward<bfloat16>(p);
}

}  // namespace MSVQ_ISA
}  // namespace msvq
