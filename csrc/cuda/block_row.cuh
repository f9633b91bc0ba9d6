// The two rows of a pair of logits, or a block's slice of them: read once, staged in shared memory where there is room.
//
// A thread visits the same elements in every sweep, so that what it staged needs no barrier, and what it writes in the
// last sweep may lie where it read. Classes beyond the row, in the first and the last word of it, count as dead.
#pragma once

#include "core/long_row.h"
#include "cuda/row_access.cuh"
#include "cuda/row_plan.h"

namespace alum::cuda {

// A launch's share of the plan.
struct RowLayout {
  unsigned blocks;       // that share a row
  int side;              // elements of either row that a block has staged, 0: none
  bool outputs_in_step;  // whether gradients can be stored in words
};

template <class T, int kPack, RowForm kForm>
class BlockRow {
 public:
  __device__ BlockRow(const DivergenceArguments& args, int64_t n, const RowLayout& layout, unsigned rank)
      : first_(static_cast<const T*>(args.a.data) + args.a.strides.offset(n)),
        b_(static_cast<const T*>(args.b.data) + args.b.strides.offset(n)),
        bias_(args.bias),
        columns_(static_cast<int>(args.columns)),
        side_(layout.side),
        outputs_in_step_(layout.outputs_in_step) {
    const int shift = shift_of<kPack>(first_);
    const int packs = (shift + columns_ + kPack - 1) / kPack, blocks = static_cast<int>(layout.blocks);
    const int share = (packs + blocks - 1) / blocks, begin = share * static_cast<int>(rank);
    count_ = begin < packs ? (packs - begin < share ? packs - begin : share) : 0;
    start_ = begin * kPack - shift;
  }

  // body(logits, first, b) for the thread's elements, read from memory and staged where there is room: then all of them
  // are on their way at once.
  template <class Body>
  __device__ __forceinline__ void read(const Body& body) const {
    if (side_ > 0) {
      each([&](int i, int v) {
        fetch_pack<kPack>(staged(i), first_, v, columns_, kOutside);
        fetch_pack<kPack>(staged(i, side_), b_, v, columns_, kDead);
      });
      wait_for_fetched();
    }
    each([&](int i, int v) {
      Stored pack = side_ > 0 ? Stored{*staged(i), *staged(i, side_)} : from_memory(v);
      if constexpr (kForm == RowForm::kBiasedDifferences) {
        if (side_ > 0) {
          add_bias(pack.b, v);
          *staged(i, side_) = pack.b;
        }
      }
      spread(pack, v, body);
    });
  }

  // body(logits) from where `read` left them.
  template <class Body>
  __device__ __forceinline__ void again(const Body& body) const {
    each([&](int i, int v) { spread(stored(i, v), v, [&](const Logits<float>& y, float, float) { body(y); }); });
  }

  // x[v] and y[v] = body(logits), a pair, likewise; y may be null.
  template <class G, class Body>
  __device__ __forceinline__ void write(G* x, G* y, const Body& body) const {
    each([&](int i, int v) {
      const Stored pack = stored(i, v);
      Pack<G, kPack> to_x, to_y;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const auto g = body(logits(pack, v, j));
        to_x.values[j] = narrow<G>(g.x);
        to_y.values[j] = narrow<G>(g.y);
      }
      store_pack<kPack>(x, v, columns_, outputs_in_step_, to_x);
      if (y != nullptr) store_pack<kPack>(y, v, columns_, outputs_in_step_, to_y);
    });
  }

  // x[v] and y[v] = value.
  template <class G>
  __device__ __forceinline__ void fill(G* x, G* y, float value) const {
    Pack<G, kPack> pack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) pack.values[j] = narrow<G>(value);
    each([&](int, int v) {
      store_pack<kPack>(x, v, columns_, outputs_in_step_, pack);
      if (y != nullptr) store_pack<kPack>(y, v, columns_, outputs_in_step_, pack);
    });
  }

  // The difference of logits of a class whose two stored values are these.
  static __device__ __forceinline__ Exact<float> difference_of(float first, float b) {
    if constexpr (kForm == RowForm::kBiasedDifferences) return {first, 0.0f};
    return exact_difference(first, b);
  }

 private:
  // What stands for a class beyond the row.
  static constexpr float kDead = -__builtin_inff();
  static constexpr float kOutside = kForm == RowForm::kBiasedDifferences ? 0.0f : kDead;

  struct Stored {
    Pack<T, kPack> first, b;
  };

  // Not kept as a pointer: an address that is seen to be in shared memory takes 32 bits and the cheaper instructions.
  static __device__ __forceinline__ Pack<T, kPack>* staged(int i, int side = 0) {
    return reinterpret_cast<Pack<T, kPack>*>(reinterpret_cast<T*>(dynamic_shared + kRoomBytes) + side) + i;
  }

  template <class Each>
  __device__ __forceinline__ void each(const Each& body) const {
    for (int i = static_cast<int>(threadIdx.x); i < count_; i += static_cast<int>(blockDim.x)) {
      body(i, start_ + i * kPack);
    }
  }

  __device__ __forceinline__ float bias_at(int v) const {
    return bias_ != nullptr && v >= 0 && v < columns_ ? bias_[v] : 0.0f;
  }

  __device__ __forceinline__ void add_bias(Pack<T, kPack>& b, int v) const {
#pragma unroll
    for (int j = 0; j < kPack; ++j) b.values[j] = narrow<T>(widen(b.values[j]) + bias_at(v + j));
  }

  // With differences, b is stored with its bias; with two logits the bias is no part of their difference.
  __device__ __forceinline__ Stored from_memory(int v) const {
    Stored pack{load_pack<kPack>(first_, v, columns_, kOutside), load_pack<kPack>(b_, v, columns_, kDead)};
    if constexpr (kForm == RowForm::kBiasedDifferences) add_bias(pack.b, v);
    return pack;
  }

  __device__ __forceinline__ Stored stored(int i, int v) const {
    if (side_ == 0) return from_memory(v);
    return {*staged(i), *staged(i, side_)};
  }

  __device__ __forceinline__ Logits<float> logits(const Stored& pack, int v, int j) const {
    const float first = widen(pack.first.values[j]), b = widen(pack.b.values[j]);
    // with differences, b was stored with its bias
    const float bias = kForm == RowForm::kBiasedLogits ? bias_at(v + j) : 0.0f;
    return class_of<kForm>(first, b, bias);
  }

  template <class Body>
  __device__ __forceinline__ void spread(const Stored& pack, int v, const Body& body) const {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      body(logits(pack, v, j), widen(pack.first.values[j]), widen(pack.b.values[j]));
    }
  }

  const T *first_, *b_;
  const float* bias_;
  int columns_, side_, start_, count_;
  bool outputs_in_step_;
};

}  // namespace alum::cuda
