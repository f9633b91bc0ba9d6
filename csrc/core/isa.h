// Where code runs and for which instruction set it is compiled.
#pragma once

#if defined(__CUDACC__)
#define ALUM_INLINE __host__ __device__ __forceinline__
#define ALUM_HOST_INLINE inline
#define ALUM_LAMBDA
#define ALUM_UNROLL _Pragma("unroll")
#else
#define ALUM_INLINE inline __attribute__((always_inline))
#define ALUM_HOST_INLINE ALUM_INLINE
#define ALUM_LAMBDA __attribute__((always_inline))
#define ALUM_NOINLINE __attribute__((noinline))
#define ALUM_UNROLL _Pragma("GCC unroll 16")
#endif

// The CPU kernels are compiled once per instruction set; each build has its own namespace, so that the linker never
// takes a function of one for a caller of another.
#if !defined(ALUM_ISA)
#define ALUM_ISA portable
#endif
#define ALUM_BEGIN \
  namespace alum { \
  inline namespace ALUM_ISA {
#define ALUM_END \
  }              \
  }
