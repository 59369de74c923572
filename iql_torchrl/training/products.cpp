// Float32 matrix products by oneDNN's kernel, PyTorch's own at::native::cpublas::brgemm (ATen/native/CPUBlas.h), which
// multiplies one block on one thread: here a product is cut into a block a thread. Compiled without PyTorch's headers,
// which would take longer than all the rest.
#include <omp.h>

#include <cstdint>
#include <cstdlib>

namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, const bool add_C, const float* A,
            const float* B, float* C, bool is_vnni);
}

namespace {

constexpr int64_t kTile = 16;  // floats of a cache line
// A product is done by panels of the right matrix that stay in a core's second cache while all rows go past them.
constexpr int64_t kSummands = 512;    // rows of a panel
constexpr int64_t kPanel = 64 * 512;  // floats of a panel
constexpr int64_t kRows = 64;         // at once, where something follows the product

int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

int64_t rounded_up(int64_t count) { return (count + kTile - 1) / kTile * kTile; }

float* scratch(int64_t count) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (count > buffer.size) {
    std::free(buffer.data);
    buffer.data = static_cast<float*>(std::aligned_alloc(64, (count + kTile - 1) / kTile * 64));
    buffer.size = count;
  }
  return buffer.data;
}

typedef float Tile __attribute__((vector_size(4 * kTile), aligned(4)));

// Swaps blocks of `size` x `size` across the diagonal of rows `first` and `first + size`.
#define IQL_TORCHRL_LOW(size, i) ((i) & size ? kTile + ((i) ^ size) : (i))
#define IQL_TORCHRL_HIGH(size, i) ((i) & size ? kTile + (i) : ((i) ^ size))
#define IQL_TORCHRL_ALL(of, size)                                                                                     \
  of(size, 0), of(size, 1), of(size, 2), of(size, 3), of(size, 4), of(size, 5), of(size, 6), of(size, 7), of(size, 8), \
      of(size, 9), of(size, 10), of(size, 11), of(size, 12), of(size, 13), of(size, 14), of(size, 15)
#define IQL_TORCHRL_SWAP(size)                                                                                   \
  for (int64_t first = 0; first < kTile; ++first)                                                                \
    if (!(first & size)) {                                                                                       \
      const Tile low = rows[first], high = rows[first + size];                                                   \
      rows[first] = __builtin_shufflevector(low, high, IQL_TORCHRL_ALL(IQL_TORCHRL_LOW, size));                  \
      rows[first + size] = __builtin_shufflevector(low, high, IQL_TORCHRL_ALL(IQL_TORCHRL_HIGH, size));          \
    }

inline void transpose_tile(const float* source, int64_t source_row, float* target, int64_t target_row) {
  Tile rows[kTile];
#pragma GCC unroll 16
  for (int64_t row = 0; row < kTile; ++row) rows[row] = *reinterpret_cast<const Tile*>(source + row * source_row);
#pragma GCC unroll 16
  IQL_TORCHRL_SWAP(8)
#pragma GCC unroll 16
  IQL_TORCHRL_SWAP(4)
#pragma GCC unroll 16
  IQL_TORCHRL_SWAP(2)
#pragma GCC unroll 16
  IQL_TORCHRL_SWAP(1)
#pragma GCC unroll 16
  for (int64_t row = 0; row < kTile; ++row) *reinterpret_cast<Tile*>(target + row * target_row) = rows[row];
}

// target[column, row] = source[row, column]
void transpose(const float* source, int64_t source_row, float* target, int64_t target_row, int64_t rows,
               int64_t columns) {
  for (int64_t i = 0; i < rows; i += kTile)
    for (int64_t j = 0; j < columns; j += kTile) {
      if (i + kTile <= rows && j + kTile <= columns) {
        transpose_tile(source + i * source_row + j, source_row, target + j * target_row + i, target_row);
        continue;
      }
      for (int64_t column = j; column < j + kTile && column < columns; ++column) {
        const int64_t end = i + kTile < rows ? i + kTile : rows;
        for (int64_t row = i; row < end; ++row)
          target[column * target_row + row] = source[row * source_row + column];
      }
    }
}

// NaN stays NaN, as in PyTorch.
void add_and_rectify(float* out, int64_t out_row, const float* bias, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict to = out + row * out_row;
    for (int64_t column = 0; column < columns; ++column) {
      const float sum = to[column] + bias[column];
      to[column] = sum < 0 ? 0 : sum;
    }
  }
}

void close(float* out, int64_t out_row, const float* gate, int64_t gate_row, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict to = out + row * out_row;
    const float* __restrict from = gate + row * gate_row;
    for (int64_t column = 0; column < columns; ++column) {
      const float value = to[column];  // read in any case, without which this is no vector operation
      to[column] = from[column] <= 0 ? 0 : value;
    }
  }
}

}  // namespace

// out[i] = left[i] right[i] for `batch` pairs of m x k and k x n, each with strides of the batch, a row and a column, of
// which the last or the one before is 1. The rows of out have stride `out_row`, its columns 1. Where they are given,
// `bias`, one number a column, is added and what is negative then is 0, and what stands where `gate` is not positive is
// 0: a ReLU's output and its gradient, applied while the block is in the cache.
extern "C" void iql_torchrl_multiply(int64_t batch, int64_t m, int64_t n, int64_t k, const float* left,
                                     int64_t left_batch, int64_t left_row, int64_t left_column, const float* right,
                                     int64_t right_batch, int64_t right_row, int64_t right_column, float* out,
                                     int64_t out_batch, int64_t out_row, const float* bias, int64_t bias_batch,
                                     const float* gate, int64_t gate_batch, int64_t gate_row) {
  const bool left_transposed = left_column != 1 && k > 1, right_transposed = right_column != 1 && n > 1;
  // Rows of the left matrix are cut where each thread would transpose all of it.
  const bool cut_columns = !left_transposed && m < n;
  const int64_t length = cut_columns ? n : m;
  int64_t parts = (omp_get_max_threads() + batch - 1) / batch;
  const int64_t part = rounded_up((length + parts - 1) / parts);
  parts = (length + part - 1) / part;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t start = p * part, count = smaller(part, length - start);
      const int64_t first_row = cut_columns ? 0 : start, rows = cut_columns ? m : count;
      const int64_t first_column = cut_columns ? start : 0, columns = cut_columns ? count : n;
      for (int64_t summand = 0; summand < k; summand += kSummands) {
        const int64_t depth = smaller(kSummands, k - summand), width = rounded_up(kPanel / depth);
        const bool last = summand + depth == k;
        const int64_t rows_at_once = last && (bias || gate) ? kRows : rows;
        const float* a = left + i * left_batch + first_row * left_row + summand * left_column;
        const float* b = right + i * right_batch + first_column * right_column + summand * right_row;
        float* left_buffer = scratch((left_transposed ? rows * depth : 0) + (right_transposed ? depth * width : 0));
        float* right_buffer = left_buffer + (left_transposed ? rows * depth : 0);
        if (left_transposed) transpose(a, left_column, left_buffer, depth, depth, rows);
        const float* matrix = left_transposed ? left_buffer : a;
        const int64_t matrix_row = left_transposed ? depth : left_row;
        for (int64_t column = 0; column < columns; column += width) {
          const int64_t now = smaller(width, columns - column);
          const float* panel = b + column * right_column;
          if (right_transposed) {
            transpose(panel, right_column, right_buffer, now, now, depth);
            panel = right_buffer;
          }
          const int64_t panel_row = right_transposed ? now : right_row, to = first_column + column;
          for (int64_t row = 0; row < rows; row += rows_at_once) {
            const int64_t high = smaller(rows_at_once, rows - row), down = first_row + row;
            float* result = out + i * out_batch + down * out_row + to;
            at::native::cpublas::brgemm(high, now, depth, matrix_row, panel_row, out_row, summand > 0,
                                        matrix + row * matrix_row, panel, result, false);
            if (bias && last) add_and_rectify(result, out_row, bias + i * bias_batch + to, high, now);
            if (gate && last)
              close(result, out_row, gate + i * gate_batch + down * gate_row + to, gate_row, high, now);
          }
        }
      }
    }
}

// Products one after the other; `arguments` has those of each.
extern "C" void iql_torchrl_multiply_all(int64_t count, const int64_t (*arguments)[20]) {
  for (const auto* a = arguments; a < arguments + count; ++a) {
    const int64_t(&v)[20] = *a;
    const auto floats = [&v](int at) { return reinterpret_cast<float*>(v[at]); };
    iql_torchrl_multiply(v[0], v[1], v[2], v[3], floats(4), v[5], v[6], v[7], floats(8), v[9], v[10], v[11],
                         floats(12), v[13], v[14], floats(15), v[16], floats(17), v[18], v[19]);
  }
}

// Whether this build of PyTorch has the kernel for this processor.
extern "C" bool iql_torchrl_can_multiply() {
  alignas(64) float a[256] = {}, b[256] = {}, c[256];
  try {
    at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a, b, c, false);
  } catch (...) {
    return false;
  }
  return true;
}
