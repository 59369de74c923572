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
constexpr int64_t kRows = 64;  // at once, where something follows the product

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

// target[column, row] = source[row, column]
void transpose(const float* source, int64_t source_row, float* target, int64_t target_row, int64_t rows,
               int64_t columns) {
  for (int64_t i = 0; i < rows; i += kTile)
    for (int64_t j = 0; j < columns; j += kTile)
      for (int64_t column = j; column < j + kTile && column < columns; ++column) {
        const int64_t end = i + kTile < rows ? i + kTile : rows;
        for (int64_t row = i; row < end; ++row)
          target[column * target_row + row] = source[row * source_row + column];
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
  // Each thread transposes what it multiplies, so the cut goes along the transposed side, which is then done once.
  const bool cut_columns = left_transposed ? false : right_transposed || m < n;
  const int64_t length = cut_columns ? n : m;
  int64_t parts = (omp_get_max_threads() + batch - 1) / batch;
  int64_t part = ((length + parts - 1) / parts + kTile - 1) / kTile * kTile;
  parts = (length + part - 1) / part;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t start = p * part, count = length - start < part ? length - start : part;
      const int64_t row = cut_columns ? 0 : start, column = cut_columns ? start : 0;
      const int64_t rows = cut_columns ? m : count, columns = cut_columns ? count : n;
      const float* a = left + i * left_batch + row * left_row;
      const float* b = right + i * right_batch + column * right_column;
      int64_t a_row = left_row, b_row = right_row;
      float* buffer = scratch((left_transposed ? rows * k : 0) + (right_transposed ? k * columns : 0));
      if (left_transposed) {
        transpose(a, left_column, buffer, k, k, rows);
        a = buffer;
        a_row = k;
        buffer += rows * k;
      }
      if (right_transposed) {
        transpose(b, right_column, buffer, columns, columns, k);
        b = buffer;
        b_row = columns;
      }
      float* block = out + i * out_batch + row * out_row + column;
      const int64_t rows_at_once = bias || gate ? kRows : rows;
      for (int64_t first = 0; first < rows; first += rows_at_once) {
        const int64_t now = rows - first < rows_at_once ? rows - first : rows_at_once;
        float* result = block + first * out_row;
        at::native::cpublas::brgemm(now, columns, k, a_row, b_row, out_row, false, a + first * a_row, b, result, false);
        if (bias) add_and_rectify(result, out_row, bias + i * bias_batch + column, now, columns);
        if (gate)
          close(result, out_row, gate + i * gate_batch + (row + first) * gate_row + column, gate_row, now, columns);
      }
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
