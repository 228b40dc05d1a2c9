// The launches: which tile, how many blocks, and how many parts of the summed dimension.
#include <algorithm>
#include <stdexcept>

#include "cuda/kernels.h"
#include "cuda/kernels_impl.h"

namespace lora_ext::cuda {
namespace {

int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }

// The tiles. Wide ones read each factor least: 1 byte a 64 multiply-adds. Narrow ones fit the rank,
// and give a small result enough blocks to occupy the card.
template <typename T>
struct Tiles {
  using Wide = MatrixTile<T, 128, 128, 64, 32>;
  using Narrow = MatrixTile<T, 64, 32, 32, 16>;
};

// f of a value of the elements' type, which is one of two.
template <typename F>
void with_half(DType dtype, const F& f) {
  if (dtype == DType::kHalf) return f(Half());
  if (dtype == DType::kBFloat16) return f(BFloat16());
  throw std::logic_error("the products are of 16-bit dtypes");
}
template <typename F>
void with_float(DType dtype, const F& f) {
  if (dtype == DType::kFloat) return f(float());
  if (dtype == DType::kDouble) return f(double());
  throw std::logic_error("the mask alone is of float and double");
}

template <typename T>
Factor factor(const Matrix& matrix, Order order) {
  const bool depth_inner = order == Order::kDepthInner;
  const int64_t inner = depth_inner ? matrix.col_stride : matrix.row_stride;
  const int64_t outer = depth_inner ? matrix.row_stride : matrix.col_stride;
  const bool is_one = (depth_inner ? matrix.rows : matrix.cols) == 1;  // its stride says nothing
  const bool in_chunks = inner == 1 && (is_one || outer * sizeof(T) % 16 == 0) &&
                         reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
  return {matrix.data, matrix.rows, matrix.cols, matrix.row_stride, matrix.col_stride, in_chunks};
}

Result result(const Matrix& out, bool add = false) {
  return {out.data, out.rows, out.cols, out.row_stride, out.col_stride, out.is_float, add};
}

template <typename Tile>
int64_t tiles_of(const Matrix& out) {
  return parts(out.rows, Tile::kBlockM) * parts(out.cols, Tile::kBlockN);
}

// Wide tiles where they give every multiprocessor one.
template <typename T>
bool takes_wide_tiles(const Context& context, const Matrix& out) {
  return tiles_of<typename Tiles<T>::Wide>(out) >= context.multiprocessors;
}

// The summed dimension is split until there are two blocks for every multiprocessor, but no part
// is shorter than 256: below that, writing and adding up the parts costs more than it wins.
constexpr int64_t kShortestPart = 256;

template <Order kLeft, Order kRight>
void product(const Context& context, const Matrix& left, const Bits& keep, const Matrix& right,
             double scale, const Matrix& out) {
  if (out.rows == 0 || out.cols == 0) return;
  with_half(context.dtype, [&](auto storage) {
    using T = decltype(storage);
    using Tile = typename Tiles<T>::Narrow;
    const int64_t tiles = tiles_of<Tile>(out), depth = left.cols;
    const int64_t wanted = parts(2 * context.multiprocessors, tiles);
    const int64_t n = std::clamp<int64_t>(depth / kShortestPart, 1, std::min<int64_t>(wanted, 64));
    const int64_t depth_of_part = parts(parts(depth, n), kShortestPart) * kShortestPart;
    const int64_t n_parts = depth == 0 ? 1 : parts(depth, depth_of_part);
    ProductArguments a = {factor<T>(left, kLeft),
                          factor<T>(right, kRight),
                          keep,
                          scale,
                          depth_of_part,
                          0,
                          result(out)};
    if (n_parts > 1) {
      a.out_part = out.rows * out.cols;
      a.out = {context.allocate(n_parts * a.out_part * sizeof(float)),
               out.rows,
               out.cols,
               out.cols,
               1,
               true,
               false};
      a.scale = 1;
    }
    auto* kernel = &lora_linear_product_kernel<Tile, kLeft, kRight, false>;
    if constexpr (kRight == kRowsInner) {  // not t, whose left factor is dy
      if (keep.data != nullptr) kernel = &lora_linear_product_kernel<Tile, kLeft, kRight, true>;
    }
    constexpr int kBytes = std::max(Ring<Tile, kLeft, kRight>::kBytes, Epilogue<T, Tile>::kBytes);
    launch(kernel, tiles, n_parts, Tile::kThreads, kBytes, context.stream, a);
    if (n_parts == 1) return;
    const SumPartsArguments sum = {a.out.data, n_parts, scale, result(out)};
    launch(lora_linear_sum_parts_kernel<T>, parts(a.out_part, kThreads), 1, kThreads, 0,
           context.stream, sum);
  });
}

// A direction of the layer: its kernel, and how the right factors lie.
struct Forward {
  static constexpr Order kRight = kDepthInner, kLowRight = kRowsInner;
  template <typename Tile>
  static constexpr auto* kKernel = &lora_linear_fwd_kernel<Tile>;
};
struct BackwardDx {
  static constexpr Order kRight = kRowsInner, kLowRight = kDepthInner;
  template <typename Tile>
  static constexpr auto* kKernel = &lora_linear_bwd_dx_kernel<Tile>;
};

template <typename Direction, typename Tile>
void launch_linear(const Context& context, const Matrix& out, const LinearArguments& a) {
  constexpr int kBytes = std::max({Ring<Tile, kDepthInner, Direction::kRight>::kBytes,
                                   Ring<Tile, kDepthInner, Direction::kLowRight>::kBytes,
                                   Epilogue<typename Tile::Storage, Tile>::kBytes});
  launch(Direction::template kKernel<Tile>, tiles_of<Tile>(out), 1, Tile::kThreads, kBytes,
         context.stream, a);
}

template <typename Direction>
void linear(const Context& context, const Matrix& left, const Matrix& right, const Bias& bias,
            const Matrix& low_left, const Matrix& low_right, const Bits& keep, double alpha,
            const Matrix& out, bool onto) {
  if (out.rows == 0 || out.cols == 0) return;
  with_half(context.dtype, [&](auto storage) {
    using T = decltype(storage);
    LinearArguments a = {factor<T>(left, kDepthInner),
                         factor<T>(right, Direction::kRight),
                         factor<T>(low_left, kDepthInner),
                         factor<T>(low_right, Direction::kLowRight),
                         keep,
                         alpha,
                         onto ? nullptr : bias.data,
                         bias.stride,
                         result(out, onto)};
    if (onto || right.data == nullptr) a.left.depth = 0;
    if (takes_wide_tiles<T>(context, out)) {
      launch_linear<Direction, typename Tiles<T>::Wide>(context, out, a);
    } else {
      launch_linear<Direction, typename Tiles<T>::Narrow>(context, out, a);
    }
  });
}

}  // namespace

int use_card(int device) {
  use_device(device);
  return multiprocessors_of(device);
}

void forward_h(const Context& context, const Matrix& x, const Bits& keep, const Matrix& A,
               const Matrix& h) {
  product<kDepthInner, kRowsInner>(context, x, keep, A.transposed(), 1, h);
}

void forward_y(const Context& context, const Matrix& x, const Matrix& weight, const Bias& bias,
               const Matrix& h, const Matrix& B, double alpha, const Matrix& y, bool onto) {
  linear<Forward>(context, x, weight, bias, h, B.transposed(), {}, alpha, y, onto);
}

void backward_t(const Context& context, const Matrix& dy, const Matrix& B, const Matrix& t) {
  product<kDepthInner, kDepthInner>(context, dy, {}, B, 1, t);
}

void backward_dx(const Context& context, const Matrix& dy, const Matrix& weight, const Matrix& t,
                 const Matrix& A, const Bits& keep, double alpha, const Matrix& dx, bool onto) {
  linear<BackwardDx>(context, dy, weight.transposed(), {}, t, A, keep, alpha, dx, onto);
}

void backward_adapter(const Context& context, const Matrix& left, const Bits& keep,
                      const Matrix& right, double alpha, const Matrix& out) {
  product<kRowsInner, kRowsInner>(context, left.transposed(), keep, right.transposed(), alpha, out);
}

void apply_mask(const Context& context, const Matrix& from, const Bits& keep, double scale,
                const Matrix& out, bool add) {
  if (out.rows == 0 || out.cols == 0) return;
  with_float(context.dtype, [&](auto storage) {
    const MaskArguments a = {from.data, from.row_stride, from.col_stride,
                             keep,      scale,           result(out, add)};
    launch(lora_linear_mask_kernel<decltype(storage)>, parts(out.rows * out.cols, kThreads), 1,
           kThreads, 0, context.stream, a);
  });
}

}  // namespace lora_ext::cuda
