// embeds + delta_0 on CUDA: a thread an element group of four, which is one Philox call.
//
//   reads  embeds (B, S, H) fp32/bf16/fp16, seed (1,) int64, mask (B, S)
//   writes embeds + delta_0 (B, S, H), delta_0 (B, S, H) fp32 if asked for
#include "cuda/launch.h"
#include "cuda/token_noise.cuh"

namespace alum::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) noise_init_kernel(NoiseArguments args) {
  const int64_t groups = (args.shape.hidden + 3) / 4, all = args.shape.tokens() * groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += stride) {
    const int64_t token = i / groups, h = 4 * (i % groups);
    const int64_t b = token / args.shape.length, s = token % args.shape.length;
    Quad<float> delta{};
    if (args.mask.keeps(b, s)) delta = draw_four(args.noise, args.noise.std.at(b, s), b, s, h);
    const int64_t offset = token * args.shape.hidden + h;
    const int count = static_cast<int>(args.shape.hidden - h < 4 ? args.shape.hidden - h : 4);
    const Quad<float> e = load_four(static_cast<const T*>(args.embeds) + offset, count);
    store_four(static_cast<T*>(args.perturbed) + offset, add(e, delta), count);
    if (args.delta != nullptr) store_four(args.delta + offset, delta, count);
  }
}

}  // namespace

void noise_init(const NoiseArguments& args, void* stream) {
  const int64_t all = args.shape.tokens() * ((args.shape.hidden + 3) / 4);
  const LaunchShape shape{dim3(grid_for(all, kThreads)), dim3(kThreads)};
  with_type(args.dtype,
            [&](auto* like) { launch(noise_init_kernel<std::remove_pointer_t<decltype(like)>>, shape, stream, args); });
}

}  // namespace alum::cuda
