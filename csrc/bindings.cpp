// msvq_fast._C: raw pointers and sizes in, no torch header; Python has checked every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "gaussian_blur/gaussian_blur.h"
#include "gaussian_blur/gaussian_blur_cuda.h"
#include "gaussian_blur/gaussian_blur_hopper_params.h"
#include "local_attention/local_attention.h"
#include "memory.h"
#include "multiscale_loss/multiscale_loss.h"
#include "multiscale_loss/multiscale_loss_cuda.h"
#include "multiscale_loss/multiscale_loss_hopper_params.h"
#include "vector_quantize/vector_quantize.h"

namespace py = pybind11;

void bind_hopper(py::module_& m);  // bindings_hopper.cpp

#ifdef MSVQ_CUDA
void check_started(int error, const char* op) {
  if (error)
    throw std::runtime_error(std::string(op) +
                             " did not start on the GPU: " + msvq::cuda_error_text(error));
}
#endif

namespace {

using Pointer = std::uintptr_t;

// The instruction set to run: the processor's best, or the one a test asks for by name.
msvq::Isa isa_named(const std::string& name) {
  using msvq::Isa;
  const Isa best = msvq::cpu_isa();
  if (name.empty()) return best;
  const Isa asked = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::portable;
  if (asked > best) throw std::invalid_argument("this processor has no " + name);
  return asked;
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names = {"portable"};
  if (msvq::cpu_isa() >= msvq::Isa::avx2) names.push_back("avx2");
  if (msvq::cpu_isa() >= msvq::Isa::avx512) names.push_back("avx512");
  return names;
}

msvq::GaussianBlurParams gaussian_blur_params(Pointer x, Pointer out, int type,
                                              std::array<int64_t, 4> size,
                                              const std::vector<float>& taps_y,
                                              const std::vector<float>& taps_x, int border,
                                              bool adjoint) {
  msvq::GaussianBlurParams params{};
  params.x = reinterpret_cast<const void*>(x);
  params.out = reinterpret_cast<void*>(out);
  params.type = static_cast<msvq::ImageType>(type);
  params.planes = size[0];
  params.height = size[1];
  params.width = size[2];
  params.inner = size[3];
  params.taps_y = taps_y.data();
  params.taps_x = taps_x.data();
  params.radius_y = static_cast<int64_t>(taps_y.size() / 2);
  params.radius_x = static_cast<int64_t>(taps_x.size() / 2);
  params.border = static_cast<msvq::Border>(border);
  params.adjoint = adjoint;
  return params;
}

void gaussian_blur_cpu(Pointer x, Pointer out, int type, std::array<int64_t, 4> size,
                       const std::vector<float>& taps_y, const std::vector<float>& taps_x,
                       int border, bool adjoint, int threads, const std::string& isa) {
  msvq::GaussianBlurParams params =
      gaussian_blur_params(x, out, type, size, taps_y, taps_x, border, adjoint);
  params.threads = threads;
  const int64_t element = params.type == msvq::ImageType::float32 ? 4
                          : params.type == msvq::ImageType::uint8 ? 1
                                                                  : 2;
  msvq::prefer_huge_pages(params.out, size[0] * size[1] * size[2] * size[3] * element);
  msvq::gaussian_blur(isa_named(isa), params);
}

void gaussian_blur_cuda_on_host(Pointer x, Pointer out, int type, std::array<int64_t, 4> size,
                                const std::vector<float>& taps_y, const std::vector<float>& taps_x,
                                int border, bool adjoint, int64_t blocks, bool reversed) {
  msvq::gaussian_blur_cuda_on_host(
      gaussian_blur_params(x, out, type, size, taps_y, taps_x, border, adjoint), blocks, reversed);
}

#ifdef __GLIBC__
// False where the kernel does not take these images.
bool gaussian_blur_hopper_on_host(Pointer x, Pointer out, int type, std::array<int64_t, 4> size,
                                  const std::vector<float>& taps_y,
                                  const std::vector<float>& taps_x, int border, bool adjoint,
                                  int64_t processors, int order) {
  const msvq::GaussianBlurParams params =
      gaussian_blur_params(x, out, type, size, taps_y, taps_x, border, adjoint);
  if (!msvq::cuda::is_banded(params)) return false;
  msvq::gaussian_blur_hopper_on_host(params, processors, order);
  return true;
}
#endif

#ifdef MSVQ_CUDA
void gaussian_blur_cuda(Pointer x, Pointer out, int type, std::array<int64_t, 4> size,
                        const std::vector<float>& taps_y, const std::vector<float>& taps_x,
                        int border, bool adjoint, int device, Pointer stream,
                        [[maybe_unused]] bool tensor_cores) {
  const msvq::GaussianBlurParams params =
      gaussian_blur_params(x, out, type, size, taps_y, taps_x, border, adjoint);
  auto* run = &msvq::gaussian_blur_cuda;
#ifdef MSVQ_HOPPER
  if (tensor_cores && msvq::cuda::is_banded(params)) run = &msvq::gaussian_blur_hopper;
#endif
  check_started(run(params, device, reinterpret_cast<void*>(stream)), "gaussian_blur");
}
#endif

// See MultiscaleLossParams; pointer 0 is null.
struct LossArguments {
  Pointer x;
  int x_type;
  std::vector<Pointer> contributions, grads;
  int type;
  std::array<int64_t, 4> size;
  std::vector<float> taps;
  int border;
  std::vector<double> weights;
  std::array<double, 2> factors;  // of the loss, of the gradients
  Pointer upstream, partials, loss, per_scale;
};

msvq::MultiscaleLossParams multiscale_loss_params(const LossArguments& a) {
  msvq::MultiscaleLossParams params{};
  params.x = reinterpret_cast<const void*>(a.x);
  params.x_type = static_cast<msvq::ImageType>(a.x_type);
  params.num_scales = static_cast<int64_t>(a.contributions.size());
  if (params.num_scales < 1 || params.num_scales > msvq::kMaxScales)
    throw std::invalid_argument("the kernels take 1 to 4 scales");
  for (size_t m = 0; m < a.contributions.size(); ++m) {
    params.contributions[m] = reinterpret_cast<const void*>(a.contributions[m]);
    params.grads[m] = reinterpret_cast<void*>(a.grads.at(m));
    params.weights[m] = a.weights.at(m);
  }
  params.type = static_cast<msvq::ImageType>(a.type);
  params.planes = a.size[0];
  params.height = a.size[1];
  params.width = a.size[2];
  params.inner = a.size[3];
  params.taps = a.taps.data();
  params.radius = static_cast<int64_t>(a.taps.size() / 2);
  params.border = static_cast<msvq::Border>(a.border);
  params.loss_factor = a.factors[0];
  params.grad_factor = a.factors[1];
  params.upstream = reinterpret_cast<const float*>(a.upstream);
  params.partials = reinterpret_cast<double*>(a.partials);
  params.loss = reinterpret_cast<float*>(a.loss);
  params.per_scale = reinterpret_cast<float*>(a.per_scale);
  return params;
}

void multiscale_loss_cpu(const LossArguments& arguments, int threads, const std::string& isa) {
  msvq::MultiscaleLossParams params = multiscale_loss_params(arguments);
  params.threads = threads;
  const int64_t element = params.type == msvq::ImageType::float32 ? 4 : 2;
  const int64_t count = params.planes * params.height * params.width * params.inner;
  for (int64_t m = 0; m < params.num_scales; ++m)
    if (params.grads[m]) msvq::prefer_huge_pages(params.grads[m], count * element);
  msvq::multiscale_loss(isa_named(isa), params);
}

bool multiscale_loss_cuda_fits(int64_t num_scales, int64_t taps, int border, int64_t room) {
  return msvq::cuda::loss_fits(num_scales, taps / 2, static_cast<msvq::Border>(border), room);
}

bool multiscale_loss_cuda_on_host(const LossArguments& arguments, int64_t blocks, int room,
                                  bool reversed) {
  return msvq::multiscale_loss_cuda_on_host(multiscale_loss_params(arguments), blocks, room,
                                            reversed);
}

#ifdef __GLIBC__
// False where the kernel does not take these images.
bool multiscale_loss_hopper_on_host(const LossArguments& arguments, int64_t processors, int order) {
  const msvq::MultiscaleLossParams params = multiscale_loss_params(arguments);
  if (!msvq::cuda::is_banded(params)) return false;
  msvq::multiscale_loss_hopper_on_host(params, processors, order);
  return true;
}
#endif

void multiscale_loss_scale_cuda_on_host(const LossArguments& arguments) {
  msvq::multiscale_loss_scale_cuda_on_host(multiscale_loss_params(arguments));
}

#ifdef MSVQ_CUDA
void multiscale_loss_cuda(const LossArguments& arguments, int device, Pointer stream,
                          [[maybe_unused]] bool tensor_cores) {
  const msvq::MultiscaleLossParams params = multiscale_loss_params(arguments);
  auto* run = &msvq::multiscale_loss_cuda;
#ifdef MSVQ_HOPPER
  if (tensor_cores && msvq::cuda::is_banded(params)) run = &msvq::multiscale_loss_hopper;
#endif
  check_started(run(params, device, reinterpret_cast<void*>(stream)), "multiscale_loss");
}

void multiscale_loss_scale_cuda(const LossArguments& arguments, int device, Pointer stream) {
  check_started(msvq::multiscale_loss_scale_cuda(multiscale_loss_params(arguments), device,
                                                 reinterpret_cast<void*>(stream)),
                "multiscale_loss");
}
#endif

msvq::RowStrides row_strides(std::array<int64_t, 3> strides) {
  return {strides[0], strides[1], strides[2]};
}

// Returns the sum of (z - e)^2; with sums = 0 only the codes are written.
double vector_quantize_cpu(Pointer z, int type, std::array<int64_t, 3> size,
                           std::array<int64_t, 3> z_strides, Pointer codebook, int64_t num_codes,
                           Pointer codes, Pointer z_q, std::array<int64_t, 3> z_q_strides,
                           Pointer counts, Pointer sums, int threads, int filter,
                           const std::string& isa) {
  double squared_error = 0;
  msvq::VectorQuantizeParams params{};
  params.z = reinterpret_cast<const void*>(z);
  params.type = static_cast<msvq::LatentType>(type);
  params.outer = size[0];
  params.inner = size[1];
  params.width = size[2];
  params.z_strides = row_strides(z_strides);
  params.codebook = reinterpret_cast<const float*>(codebook);
  params.num_codes = num_codes;
  params.codes = reinterpret_cast<int64_t*>(codes);
  params.z_q = reinterpret_cast<void*>(z_q);
  params.z_q_strides = row_strides(z_q_strides);
  params.squared_error = &squared_error;
  params.counts = reinterpret_cast<int64_t*>(counts);
  params.sums = reinterpret_cast<float*>(sums);
  params.filter = static_cast<msvq::Filter>(filter);
  params.threads = threads;
  msvq::vector_quantize(isa_named(isa), params);
  return squared_error;
}

void vector_quantize_backward_cpu(Pointer z, Pointer grad_z_q, Pointer grad_z, int type,
                                  std::array<int64_t, 3> size, std::array<int64_t, 3> strides,
                                  Pointer codebook, Pointer codes, double scale, int threads,
                                  const std::string& isa) {
  msvq::VectorQuantizeBackwardParams params{};
  params.z = reinterpret_cast<const void*>(z);
  params.grad_z_q = reinterpret_cast<const void*>(grad_z_q);
  params.grad_z = reinterpret_cast<void*>(grad_z);
  params.type = static_cast<msvq::LatentType>(type);
  params.outer = size[0];
  params.inner = size[1];
  params.width = size[2];
  params.strides = row_strides(strides);
  params.codebook = reinterpret_cast<const float*>(codebook);
  params.codes = reinterpret_cast<const int64_t*>(codes);
  params.scale = static_cast<float>(scale);
  params.threads = threads;
  msvq::vector_quantize_backward(isa_named(isa), params);
}

// (pointer, batch stride, head stride, token stride) of a TokenTensor.
using Tokens = std::array<int64_t, 4>;

// `queries` holds q and out, of the backward also grad_out and grad_q; `tokens` the keys and values
// of every scale, then their gradients. Pointer 0 is no bias. `grids` is (h, w) of the queries,
// then (h, w, kernel) of every scale.
void local_attention_cpu(int type, std::array<int64_t, 4> size, const std::vector<int64_t>& grids,
                         std::array<bool, 4> rules, double scale,
                         const std::vector<Tokens>& queries, const std::vector<Tokens>& tokens,
                         const std::vector<Pointer>& bias, const std::vector<Pointer>& grad_bias,
                         Pointer lse, int threads, const std::string& isa) {
  const auto described = [](const std::vector<Tokens>& list, size_t i) -> msvq::TokenTensor {
    if (i >= list.size()) return {};
    const Tokens& t = list[i];
    return {reinterpret_cast<void*>(static_cast<Pointer>(t[0])), t[1], t[2], t[3]};
  };
  const size_t num_scales = bias.size();
  std::vector<msvq::AttentionScale> scales(num_scales);
  for (size_t n = 0; n < num_scales; ++n) {
    scales[n] = {described(tokens, n),
                 described(tokens, num_scales + n),
                 described(tokens, 2 * num_scales + n),
                 described(tokens, 3 * num_scales + n),
                 reinterpret_cast<const void*>(bias[n]),
                 reinterpret_cast<void*>(grad_bias[n]),
                 grids[2 + 3 * n],
                 grids[3 + 3 * n],
                 grids[4 + 3 * n]};
  }
  msvq::LocalAttentionParams params{};
  params.type = static_cast<msvq::FloatType>(type);
  params.batch = size[0];
  params.heads = size[1];
  params.kv_heads = size[2];
  params.channels = size[3];
  params.height = grids[0];
  params.width = grids[1];
  params.q = described(queries, 0);
  params.out = described(queries, 1);
  params.grad_out = described(queries, 2);
  params.grad_q = described(queries, 3);
  params.lse = reinterpret_cast<void*>(lse);
  params.scales = scales.data();
  params.num_scales = static_cast<int64_t>(num_scales);
  params.own = rules[0];
  params.raster = rules[1];
  params.include_self = rules[2];
  params.shift = rules[3];
  params.scale = scale;
  params.threads = threads;
  if (queries.size() == 2) {
    msvq::local_attention(isa_named(isa), params);
  } else {
    msvq::local_attention_backward(isa_named(isa), params);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isas", &cpu_isas, "Instruction sets this processor runs, best last");
  m.def("gaussian_blur_cpu", &gaussian_blur_cpu, py::arg("x"), py::arg("out"), py::arg("type"),
        py::arg("size"), py::arg("taps_y"), py::arg("taps_x"), py::arg("border"),
        py::arg("adjoint"), py::arg("threads"), py::arg("isa") = "",
        py::call_guard<py::gil_scoped_release>());
  m.def("gaussian_blur_cuda_on_host", &gaussian_blur_cuda_on_host, py::arg("x"), py::arg("out"),
        py::arg("type"), py::arg("size"), py::arg("taps_y"), py::arg("taps_x"), py::arg("border"),
        py::arg("adjoint"), py::arg("blocks"), py::arg("reversed"));
#ifdef __GLIBC__
  m.def("gaussian_blur_hopper_on_host", &gaussian_blur_hopper_on_host, py::arg("x"), py::arg("out"),
        py::arg("type"), py::arg("size"), py::arg("taps_y"), py::arg("taps_x"), py::arg("border"),
        py::arg("adjoint"), py::arg("processors"), py::arg("order"));
#endif
#ifdef MSVQ_CUDA
  m.def("gaussian_blur_cuda", &gaussian_blur_cuda, py::arg("x"), py::arg("out"), py::arg("type"),
        py::arg("size"), py::arg("taps_y"), py::arg("taps_x"), py::arg("border"),
        py::arg("adjoint"), py::arg("device"), py::arg("stream"), py::arg("tensor_cores"),
        py::call_guard<py::gil_scoped_release>());
#endif
  py::class_<LossArguments>(m, "MultiscaleLossArguments")
      .def(py::init<Pointer, int, std::vector<Pointer>, std::vector<Pointer>, int,
                    std::array<int64_t, 4>, std::vector<float>, int, std::vector<double>,
                    std::array<double, 2>, Pointer, Pointer, Pointer, Pointer>(),
           py::arg("x"), py::arg("x_type"), py::arg("contributions"), py::arg("grads"),
           py::arg("type"), py::arg("size"), py::arg("taps"), py::arg("border"), py::arg("weights"),
           py::arg("factors"), py::arg("upstream"), py::arg("partials"), py::arg("loss"),
           py::arg("per_scale"));
  m.def("multiscale_loss_cpu", &multiscale_loss_cpu, py::arg("arguments"), py::arg("threads"),
        py::arg("isa") = "", py::call_guard<py::gil_scoped_release>());
  m.attr("MULTISCALE_LOSS_PARTIALS") = msvq::kMaxLossBlocks * msvq::kMaxScales;
  m.def("multiscale_loss_cuda_fits", &multiscale_loss_cuda_fits, py::arg("num_scales"),
        py::arg("taps"), py::arg("border"), py::arg("room"),
        "Whether blocks of `room` bytes of shared memory can run the CUDA kernel");
  m.def("multiscale_loss_cuda_on_host", &multiscale_loss_cuda_on_host, py::arg("arguments"),
        py::arg("blocks"), py::arg("room"), py::arg("reversed"));
  m.def("multiscale_loss_scale_cuda_on_host", &multiscale_loss_scale_cuda_on_host,
        py::arg("arguments"));
#ifdef __GLIBC__
  m.def("multiscale_loss_hopper_on_host", &multiscale_loss_hopper_on_host, py::arg("arguments"),
        py::arg("processors"), py::arg("order"));
#endif
#ifdef MSVQ_CUDA
  m.def("multiscale_loss_cuda", &multiscale_loss_cuda, py::arg("arguments"), py::arg("device"),
        py::arg("stream"), py::arg("tensor_cores") = false,
        py::call_guard<py::gil_scoped_release>());
  m.def("multiscale_loss_scale_cuda", &multiscale_loss_scale_cuda, py::arg("arguments"),
        py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
  m.def("vector_quantize_cpu", &vector_quantize_cpu, py::arg("z"), py::arg("type"), py::arg("size"),
        py::arg("z_strides"), py::arg("codebook"), py::arg("num_codes"), py::arg("codes"),
        py::arg("z_q"), py::arg("z_q_strides"), py::arg("counts"), py::arg("sums"),
        py::arg("threads"), py::arg("filter") = static_cast<int>(msvq::Filter::split),
        py::arg("isa") = "", py::call_guard<py::gil_scoped_release>());
  m.def("vector_quantize_backward_cpu", &vector_quantize_backward_cpu, py::arg("z"),
        py::arg("grad_z_q"), py::arg("grad_z"), py::arg("type"), py::arg("size"),
        py::arg("strides"), py::arg("codebook"), py::arg("codes"), py::arg("scale"),
        py::arg("threads"), py::arg("isa") = "", py::call_guard<py::gil_scoped_release>());
  m.def("local_attention_cpu", &local_attention_cpu, py::arg("type"), py::arg("size"),
        py::arg("grids"), py::arg("rules"), py::arg("scale"), py::arg("queries"), py::arg("tokens"),
        py::arg("bias"), py::arg("grad_bias"), py::arg("lse"), py::arg("threads"),
        py::arg("isa") = "", py::call_guard<py::gil_scoped_release>());
  bind_hopper(m);
}
