// Rows of the linear divergence on CUDA: what a product with a head's weight gave becomes what the next two products take.
// Formulas: core/divergence.h. The twin of csrc/cpu/linear_symmetric_kl.h.
//
//   reads   b and a - b, or both logits, (N, V) fp32; bias (V,); row_weight (N,)
//   writes  loss (N,); d/da and d/da + d/db, (N, V) fp32, bf16 or fp16, where they are wanted
//
// One launch; each product is read once (rows longer than row_plan.h can stage: then again from L2). Gradients in fp32
// may lie where the products did: an element is read for the last time by the thread that writes it, in the sweep in
// which it does. The bias comes to both sides' logits and not to their difference.
#include "cuda/launch.h"
#include "cuda/long_rows.cuh"

namespace alum::cuda {
namespace {

// d/da and, with `grad_sum`, d/da + d/db of one row.
template <class G, class Row>
__device__ __forceinline__ void write_gradients(const DivergenceArguments& args, Rule rule, const Row& row, int64_t n,
                                                const RowStatistics<float>& stats, float loss, float factor) {
  row.write(output_row<G>(args.grad_a, n, args.columns), output_row<G>(args.grad_sum, n, args.columns),
            [&](const Logits<float>& y) {
              if (args.grad_sum == nullptr) {
                return GradientPair{class_gradient(rule, y, stats, args.inv_temperature).da * factor, 0.0f};
              }
              const auto g = linear_class_gradient(rule, y, stats, loss, args.inv_temperature);
              return GradientPair{g.da * factor, g.sum * factor};
            });
}

template <class G, class Row>
__device__ __forceinline__ void fill_gradients(const DivergenceArguments& args, const Row& row, int64_t n,
                                               float value) {
  row.fill(output_row<G>(args.grad_a, n, args.columns), output_row<G>(args.grad_sum, n, args.columns), value);
}

template <int kPack, bool kExact, RowForm kForm>
__global__ void __launch_bounds__(kMostRowThreads)
    linear_rows_kernel(DivergenceArguments args, Rule rule, RowLayout layout) {
  using Row = BlockRow<float, kPack, kForm>;
  const auto write = [&](const Row& row, int64_t n, const RowStatistics<float>& stats, float loss, float factor) {
    switch (args.grad_dtype) {
      case Dtype::kFloat32:
        return write_gradients<float>(args, rule, row, n, stats, loss, factor);
      case Dtype::kBFloat16:
        return write_gradients<__nv_bfloat16>(args, rule, row, n, stats, loss, factor);
      case Dtype::kFloat16:
        return write_gradients<__half>(args, rule, row, n, stats, loss, factor);
    }
  };
  const auto fill = [&](const Row& row, int64_t n, float value) {
    switch (args.grad_dtype) {
      case Dtype::kFloat32:
        return fill_gradients<float>(args, row, n, value);
      case Dtype::kBFloat16:
        return fill_gradients<__nv_bfloat16>(args, row, n, value);
      case Dtype::kFloat16:
        return fill_gradients<__half>(args, row, n, value);
    }
  };
  each_long_row<kExact, Row>(args, layout, write, fill);
}

template <RowForm kForm>
void launch_linear(const DivergenceArguments& args, void* stream) {
  const Rule rule = rule_of(args.divergence, args.convention);
  const size_t output_bytes = args.grad_dtype == Dtype::kFloat32 ? 4 : 2;
  with_long_rows<float>(args, args.grad_sum, output_bytes,
                        [&](auto pack, auto exact, const RowLayout& layout, const LaunchShape& shape) {
                          launch(linear_rows_kernel<decltype(pack)::value, decltype(exact)::value, kForm>, shape,
                                 stream, args, rule, layout);
                        });
}

}  // namespace

void linear_divergence(const DivergenceArguments& args, void* stream) {
  if (args.dtype != Dtype::kFloat32) {
    throw std::runtime_error("alum_kernels: expected the products of a linear divergence in float32");
  }
  if (args.differences) {
    launch_linear<RowForm::kBiasedDifferences>(args, stream);
  } else {
    launch_linear<RowForm::kBiasedLogits>(args, stream);
  }
}

}  // namespace alum::cuda
