// What a kernel for Hopper (sm_90a) is written against: products of a warpgroup on the tensor
// cores, barriers of part of a block, and bits. On the host a model of a block takes their place
// (cuda/warps_on_host.h), so that the kernel's own source runs where there is no GPU.
#pragma once
#include <cstdint>

#if !defined(__CUDACC__)
#include "cuda/warps_on_host.h"
#else
#define MSVQ_WARPS __device__ __forceinline__
#define MSVQ_WARPS_HOST __host__ __device__ inline
#define MSVQ_UNROLL _Pragma("unroll")
#define MSVQ_NO_UNROLL _Pragma("unroll 1")

namespace msvq {
namespace cuda {

// The fragments of a warpgroup's product: of thread 32 w + 4 g + q the rows 16 w + g and
// 16 w + g + 8 and of every eight columns 2 q and 2 q + 1; of the left side likewise, eight columns
// further in a[2] and a[3].
constexpr int kProductColumns = 64;
using Accumulators = float[kProductColumns / 2];

// An address in shared memory as instructions take it.
MSVQ_WARPS uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Where a matrix of half-precision numbers lies in shared memory for a product: blocks of eight
// rows by 16 bytes, `along` bytes apart in the direction that is summed, `across` in the other.
// A block at a multiple of 128 bytes is one line of the banks.
struct MatrixDescriptor {
  uint32_t from, strides;

  MSVQ_WARPS MatrixDescriptor(uint32_t address, int along, int across)
      : from((address & 0x3FFFF) >> 4 | static_cast<uint32_t>(along >> 4) << 16),
        strides(static_cast<uint32_t>(across >> 4)) {}
  MSVQ_WARPS MatrixDescriptor operator+(int bytes) const {
    MatrixDescriptor moved = *this;
    moved.from += static_cast<uint32_t>(bytes) >> 4;
    return moved;
  }
};

// Order ordinary accesses to shared memory before those of the tensor cores and of copies; then a
// barrier is needed.
MSVQ_WARPS void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
MSVQ_WARPS void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MSVQ_WARPS void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
MSVQ_WARPS void wait_products(Accumulators& out) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  MSVQ_UNROLL
  for (int i = 0; i < kProductColumns / 2; ++i) asm volatile("" : "+f"(out[i])::"memory");
}

// out (64, 64) = a (64, 16) b (64, 16)^T, or out += that.
MSVQ_WARPS void multiply(Accumulators& out, const uint32_t (&a)[4], const MatrixDescriptor& b,
                         bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .b64 b;\n"
      "setp.ne.b32 p, %38, 0;\n"
      "mov.b64 b, {%36, %37};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, b, p, 1, 1, 0;\n"
      "}\n"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3]), "+f"(out[4]), "+f"(out[5]),
        "+f"(out[6]), "+f"(out[7]), "+f"(out[8]), "+f"(out[9]), "+f"(out[10]), "+f"(out[11]),
        "+f"(out[12]), "+f"(out[13]), "+f"(out[14]), "+f"(out[15]), "+f"(out[16]), "+f"(out[17]),
        "+f"(out[18]), "+f"(out[19]), "+f"(out[20]), "+f"(out[21]), "+f"(out[22]), "+f"(out[23]),
        "+f"(out[24]), "+f"(out[25]), "+f"(out[26]), "+f"(out[27]), "+f"(out[28]), "+f"(out[29]),
        "+f"(out[30]), "+f"(out[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.from), "r"(b.strides),
        "r"(static_cast<int>(add)));
}

// Four blocks of eight rows by 16 bytes; lane l has the address of row l % 8 of block l / 8, and
// gets values 2 (l % 4) and one further of row l / 4 of each.
MSVQ_WARPS void load_blocks(uint32_t address, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// A warp's product: out (16, 8) += a (16, 16) b (8, 16)^T, b as `load_blocks` gives it.
MSVQ_WARPS void multiply(float (&out)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of eight values a row: a[0] and a[1] of above, and b0.
MSVQ_WARPS void multiply_eight(float (&out)[4], uint32_t upper, uint32_t lower, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
      : "r"(upper), "r"(lower), "r"(b));
}

// A barrier in shared memory: a phase ends when `count` arrivals have come.
MSVQ_WARPS void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count));
}
MSVQ_WARPS void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// An arrival, and `bytes` of copies to come before the phase ends.
MSVQ_WARPS void arrive_with_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// A copy that the copy engine makes, of whole 16 bytes at multiples of 16.
MSVQ_WARPS void copy_to_shared(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Begin to bring what a later copy reads nearer: whole 16 bytes at multiples of 16.
MSVQ_WARPS void prefetch_bytes(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}
// Copies of 4 or 16 bytes, at a multiple of that, that a thread asks for; those that it asked for
// since the last end_copies are a group.
template <int kBytes>
MSVQ_WARPS void copy_ahead(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 16, "of one element or of a whole quad");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}
MSVQ_WARPS void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kLeft groups of this thread have come; the warp then has to meet.
template <int kLeft>
MSVQ_WARPS void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// Until the phase of this parity is over; before the first ends, that of parity 1 is.
MSVQ_WARPS void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Brings 32 bytes to the second-level cache.
MSVQ_WARPS void prefetch_second(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Reads of memory that does not change, begun where they are written: ptxas moves others down to
// where their outcome is first needed.
MSVQ_WARPS float4 load_now(const float4* from) {
  float4 x;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from));
  return x;
}
MSVQ_WARPS uint2 load_now(const uint2* from) {
  uint2 x;
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from));
  return x;
}
MSVQ_WARPS int load_now(const int16_t* from) {
  int x;
  asm volatile("ld.global.nc.s16 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}
// A write that is not read again here, made where `sign` is not negative, without a branch.
MSVQ_WARPS void store_where(int sign, float4* to, const float4& x) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ge.s32 p, %0, 0;\n"
      "@p st.global.cs.v4.f32 [%1], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(sign),
      "l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
}
MSVQ_WARPS void store_where(int sign, uint2* to, const uint2& x) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ge.s32 p, %0, 0;\n"
      "@p st.global.cs.v2.b32 [%1], {%2, %3};\n"
      "}\n" ::"r"(sign),
      "l"(to), "r"(x.x), "r"(x.y)
      : "memory");
}

// sum += x where `there` is not 0, without a branch or a copy.
MSVQ_WARPS void add_where(uint32_t there, float4& sum, const float4& x) {
  asm("{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %8, 0;\n"
      "@p add.f32 %0, %0, %4;\n"
      "@p add.f32 %1, %1, %5;\n"
      "@p add.f32 %2, %2, %6;\n"
      "@p add.f32 %3, %3, %7;\n"
      "}\n"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(there));
}

// threadIdx.x, read again: what follows from it need not be kept in registers from before.
MSVQ_WARPS int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 1023;
}

MSVQ_WARPS int least_of_three(int a, int b, int c) { return __vimin3_s32(a, b, c); }

// A number, not known to be the one it was: what was worked out from that need not be kept either.
MSVQ_WARPS float again(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
MSVQ_WARPS uint32_t again(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
MSVQ_WARPS int again(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Within 2^-22 of the root of a number that is not subnormal.
MSVQ_WARPS float quick_root(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

// The larger number, or NaN if one is.
MSVQ_WARPS float larger_or_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// Two numbers rounded to half precision, the first in the low bits, and back.
MSVQ_WARPS uint32_t pack_halves(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
MSVQ_WARPS float2 unpack_halves(uint32_t bits) {
  float2 x;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}\n"
      : "=f"(x.x), "=f"(x.y)
      : "r"(bits));
  return x;
}
MSVQ_WARPS uint32_t pack_bfloats(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
MSVQ_WARPS float2 unpack_bfloats(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
}

}  // namespace cuda
}  // namespace msvq

#endif
