// embeds + Pi(delta + step normalise(g)) on CUDA, in one launch at every level.
//
//   reads  embeds, grad (B, S, H) fp32/bf16/fp16, delta (B, S, H) fp32 or the seed, mask (B, S)
//   writes embeds + delta'' (B, S, H), delta'' (B, S, H) fp32 and statistics (B, S, 4) fp32 if asked for
//
// A warp works on a token, a lane on four neighbouring features at a time. At token level a warp runs through all phases
// of its token at once. At sequence and batch level the grid is as large as fits on the chip at once (a cooperative
// launch): each phase leaves a partial for every token, the grid meets, one block a group combines the group's partials
// in an order that their number alone determines, the grid meets again. No atomics: the same input gives the same bits.
//
// Norm and normalisation are branches that all threads take alike, not template arguments: the kernels wait for memory,
// and 16 variants of each would be minutes of nvcc.
#include <cooperative_groups.h>

#include "core/ascent.h"
#include "cuda/launch.h"
#include "cuda/token_noise.cuh"

namespace alum::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

__device__ __forceinline__ float element(const Quad<float>& x, int i) {
  return i == 0 ? x.x0 : i == 1 ? x.x1 : i == 2 ? x.x2 : x.x3;
}

// One token of an ascent, worked on by one warp: T is the type of the embeddings, G that of the gradient.
template <class T, class G>
struct WarpToken {
  const AscentArguments& args;
  int64_t token, b, s;
  float step, epsilon, std;
  bool kept;

  __device__ WarpToken(const AscentArguments& args, int64_t token)
      : args(args),
        token(token),
        b(token / args.shape.length),
        s(token % args.shape.length),
        step(args.step_size.at(b, s)),
        epsilon(args.epsilon.at(b, s)),
        std(args.delta == nullptr ? args.noise.std.at(b, s) : 0.0f),
        kept(args.mask.keeps(b, s)) {}

  // body(h, count, g) for the lane's groups of four features.
  template <class Body>
  __device__ __forceinline__ void each_gradient(const Body& body) const {
    const int64_t hidden = args.shape.hidden;
    const G* grad = static_cast<const G*>(args.grad) + token * hidden;
    for (int64_t h = 4 * (threadIdx.x % kWarp); h < hidden; h += 4 * kWarp) {
      const int count = static_cast<int>(hidden - h < 4 ? hidden - h : 4);
      body(h, count, load_four(grad + h, count));
    }
  }

  // body(h, count, delta, g) likewise.
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    const float* given = args.delta == nullptr ? nullptr : args.delta + token * args.shape.hidden;
    each_gradient([&](int64_t h, int count, const Quad<float>& g) {
      const Quad<float> delta = given == nullptr ? draw_four(args.noise, std, b, s, h) : load_four(given + h, count);
      body(h, count, delta, g);
    });
  }

  __device__ TokenPartial reduce(Phase phase, const GroupNorms& group) const {
    const bool sum = is_sum(phase);
    const auto join = [sum](auto x, auto y) { return sum ? x + y : larger_of(y, x); };
    double value = 0.0;  // in fp32 equal terms would round the same way at every step
    float non_finite = 0.0f;
    const auto add_terms = [&](int count, const auto& x) {
      float four = 0.0f;
      for (int i = 0; i < count; ++i) four = join(four, phase_term(phase, x(i), group));
      value = join(value, static_cast<double>(four));
    };
    if (phase == Phase::kGradLargest || phase == Phase::kGradLength) {
      each_gradient([&](int64_t, int count, const Quad<float>& g) {
        add_terms(count, [&](int i) { return element(g, i); });
        for (int i = 0; i < count; ++i) non_finite += absolute(element(g, i)) < __builtin_inff() ? 0.0f : 1.0f;
      });
    } else {
      each([&](int64_t, int count, const Quad<float>& delta, const Quad<float>& g) {
        add_terms(count, [&](int i) { return moved(args.normalize, element(delta, i), element(g, i), step, group); });
      });
    }
    const TokenPartial lane{static_cast<float>(value), non_finite};
    return warp_reduce(lane, [join](const TokenPartial& x, const TokenPartial& y) {
      return TokenPartial{join(x.value, y.value), x.non_finite + y.non_finite};
    });
  }

  __device__ void write(const GroupNorms& group) const {
    const int64_t offset = token * args.shape.hidden;
    const T* embeds = static_cast<const T*>(args.embeds) + offset;
    T* perturbed = static_cast<T*>(args.perturbed) + offset;
    double squares = 0.0;
    float4 counts{0.0f, 0.0f, 0.0f, 0.0f};
    each([&](int64_t h, int count, const Quad<float>& delta, const Quad<float>& g) {
      const Quad<float> e = load_four(embeds + h, count);
      float bound[4] = {0.0f, 0.0f, 0.0f, 0.0f}, four = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float free = moved(args.normalize, element(delta, i), element(g, i), step, group);
        bound[i] = projected(args.norm, free, epsilon, group);
        if (i < count) {
          const float rounded = widen(narrow<T>(__fadd_rn(element(e, i), bound[i])));
          four += bound[i] * bound[i];
          counts.y += bound[i] != free ? 1.0f : 0.0f;
          counts.z += rounded == element(e, i) && bound[i] != 0.0f ? 1.0f : 0.0f;
          counts.w += absolute(element(g, i)) < __builtin_inff() ? 0.0f : 1.0f;
        }
      }
      squares += four;
      const Quad<float> d{bound[0], bound[1], bound[2], bound[3]};
      store_four(perturbed + h, add(e, d), count);
      if (args.new_delta != nullptr) store_four(args.new_delta + offset + h, d, count);
    });
    if (args.statistics == nullptr) return;
    counts.x = static_cast<float>(squares);
    counts = warp_reduce(
        counts, [](const float4& x, const float4& y) { return float4{x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}; });
    if (threadIdx.x % kWarp == 0) put_statistics(counts);
  }

  __device__ void pass_through() const {
    const int64_t offset = token * args.shape.hidden;
    const T* embeds = static_cast<const T*>(args.embeds) + offset;
    T* perturbed = static_cast<T*>(args.perturbed) + offset;
    for (int64_t h = threadIdx.x % kWarp; h < args.shape.hidden; h += kWarp) {
      perturbed[h] = embeds[h];
      if (args.new_delta != nullptr) args.new_delta[offset + h] = 0.0f;
    }
    if (args.statistics != nullptr && threadIdx.x % kWarp == 0) put_statistics(float4{0.0f, 0.0f, 0.0f, 0.0f});
  }

  __device__ void put_statistics(const float4& counts) const {
    float* row = args.statistics + token * kAscentStatistics;
    row[0] = counts.x;
    row[1] = counts.y;
    row[2] = counts.z;
    row[3] = counts.w;
  }
};

// Groups are tokens: a warp knows all of its group.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, 2) ascent_tokens_kernel(AscentArguments args) {
  const PhaseList list = reductions(args.normalize, args.norm);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; token < args.shape.tokens();
       token += stride) {
    const WarpToken<T, G> row(args, token);
    if (!row.kept) {
      row.pass_through();
      continue;
    }
    GroupNorms group;
    for (int i = 0; i < list.count; ++i) {
      const TokenPartial partial = row.reduce(list[i], group);
      absorb(group, list[i], partial.value, partial.non_finite == 0.0f);
    }
    row.write(group);
  }
}

struct GroupScratch {
  TokenPartial* partials;  // (B S)
  GroupNorms* norms;       // (groups,)
};

struct ValueAndCount {
  double value;
  float non_finite, unused;
};
constexpr size_t kRoomBytes = kWarps * sizeof(ValueAndCount);

// Groups are sequences, or the batch.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, 2) ascent_groups_kernel(AscentArguments args, GroupScratch scratch) {
  const auto grid = cooperative_groups::this_grid();
  const PhaseList list = reductions(args.normalize, args.norm);
  const int64_t tokens = args.shape.tokens();
  const int64_t per_group = args.level == Level::kBatch ? tokens : args.shape.length, groups = tokens / per_group;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;

  for (int i = 0; i < list.count; ++i) {
    const Phase phase = list[i];
    for (int64_t token = first; token < tokens; token += stride) {
      const WarpToken<T, G> row(args, token);
      TokenPartial partial{0.0f, 0.0f};
      if (row.kept) {
        const GroupNorms known = i == 0 ? GroupNorms{} : scratch.norms[token / per_group];
        partial = row.reduce(phase, known);
      }
      if (lane == 0) scratch.partials[token] = {partial.value, partial.non_finite};
    }
    grid.sync();
    for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
      const bool sum = is_sum(phase);
      ValueAndCount total{0.0, 0.0f, 0.0f};
      for (int64_t t = threadIdx.x; t < per_group; t += kThreads) {
        const TokenPartial partial = scratch.partials[group * per_group + t];
        const double value = partial.value;
        total.value = sum ? total.value + value : (value > total.value ? value : total.value);
        total.non_finite += partial.non_finite;
      }
      total = block_reduce(total, reinterpret_cast<ValueAndCount*>(dynamic_shared),
                           [sum](const ValueAndCount& x, const ValueAndCount& y) {
                             return ValueAndCount{sum ? x.value + y.value : (y.value > x.value ? y.value : x.value),
                                                  x.non_finite + y.non_finite, 0.0f};
                           });
      if (threadIdx.x == 0) {
        GroupNorms norms = i == 0 ? GroupNorms{} : scratch.norms[group];
        absorb(norms, phase, static_cast<float>(total.value), total.non_finite == 0.0f);
        scratch.norms[group] = norms;
      }
    }
    grid.sync();
  }
  for (int64_t token = first; token < tokens; token += stride) {
    const WarpToken<T, G> row(args, token);
    if (row.kept) {
      row.write(scratch.norms[token / per_group]);
    } else {
      row.pass_through();
    }
  }
}

template <class Kernel>
int64_t blocks_at_once(Kernel kernel) {
  int per_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, kRoomBytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return static_cast<int64_t>(per_multiprocessor) * device_attribute(cudaDevAttrMultiProcessorCount);
}

template <class T, class G>
void launch_ascent(const AscentArguments& args, void* stream) {
  const int64_t blocks = grid_for(args.shape.tokens(), kWarps);
  if (args.level == Level::kToken) {
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads)};
    return launch(ascent_tokens_kernel<T, G>, shape, stream, args);
  }
  auto* partials = static_cast<TokenPartial*>(args.scratch);
  const GroupScratch scratch{partials, reinterpret_cast<GroupNorms*>(partials + args.shape.tokens())};
  const auto kernel = ascent_groups_kernel<T, G>;
  const int64_t at_once = blocks_at_once(kernel);
  LaunchShape shape{dim3(static_cast<unsigned>(blocks < at_once ? blocks : at_once)), dim3(kThreads)};
  shape.shared_bytes = kRoomBytes;
  shape.cooperative = true;
  launch(kernel, shape, stream, args, scratch);
}

}  // namespace

int64_t ascent_scratch_bytes(const AscentArguments& args) {
  if (args.level == Level::kToken) return 0;
  const int64_t groups = args.level == Level::kBatch ? 1 : args.shape.batch;
  return args.shape.tokens() * static_cast<int64_t>(sizeof(TokenPartial)) +
         groups * static_cast<int64_t>(sizeof(GroupNorms));
}

void projected_ascent(const AscentArguments& args, void* stream) {
  with_type(args.dtype, [&](auto* like) {
    using T = std::remove_pointer_t<decltype(like)>;
    if (args.grad_dtype == Dtype::kFloat32) {
      launch_ascent<T, float>(args, stream);
    } else {
      launch_ascent<T, T>(args, stream);
    }
  });
}

}  // namespace alum::cuda
