// The part of msvq_fast._C for the quantizer and for pyramids on Hopper.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "gaussian_blur/gaussian_blur_cuda.h"
#include "multiscale_loss/multiscale_loss_hopper_params.h"
#include "vector_quantize/quantize_hopper_params.h"

namespace py = pybind11;

void check_started(int error, const char* op);  // bindings.cpp

namespace {

using Pointer = std::uintptr_t;

// Of planes, height and width.
msvq::GaussianBlurParams blur_params(Pointer x, Pointer out, int type, std::array<int64_t, 3> size,
                                     const std::vector<float>& taps, int border) {
  msvq::GaussianBlurParams params{};
  params.x = reinterpret_cast<const void*>(x);
  params.out = reinterpret_cast<void*>(out);
  params.type = static_cast<msvq::ImageType>(type);
  params.planes = size[0], params.height = size[1], params.width = size[2], params.inner = 1;
  params.taps_y = params.taps_x = taps.data();
  params.radius_y = params.radius_x = static_cast<int64_t>(taps.size() / 2);
  params.border = static_cast<msvq::Border>(border);
  return params;
}

// `parts` is of errors, counts and sums.
msvq::QuantizeHopperParams quantize_hopper_params(Pointer z, int type, std::array<int, 2> size,
                                                  std::array<int, 2> strides, Pointer codebook,
                                                  Pointer codes, Pointer keys, Pointer z_q,
                                                  std::array<Pointer, 3> parts) {
  msvq::QuantizeHopperParams params{};
  params.z = reinterpret_cast<const void*>(z);
  params.type = static_cast<msvq::LatentType>(type);
  params.count = size[0];
  params.num_codes = size[1];
  params.z_stride = strides[0];
  params.z_q_stride = strides[1];
  params.codebook = reinterpret_cast<const float*>(codebook);
  params.codes = reinterpret_cast<int64_t*>(codes);
  params.keys = reinterpret_cast<int16_t*>(keys);
  params.z_q = reinterpret_cast<void*>(z_q);
  params.errors = reinterpret_cast<double*>(parts[0]);
  params.counts = reinterpret_cast<int32_t*>(parts[1]);
  params.sums = reinterpret_cast<float*>(parts[2]);
  return params;
}

// Of rows, codes and parts; `parts` is of counts and sums.
msvq::QuantizeHopperSums quantize_hopper_sums(Pointer z, int type, std::array<int, 3> size,
                                              int stride, Pointer keys,
                                              std::array<Pointer, 2> parts) {
  msvq::QuantizeHopperSums params{};
  params.z = reinterpret_cast<const void*>(z);
  params.type = static_cast<msvq::LatentType>(type);
  params.count = size[0];
  params.num_codes = size[1];
  params.parts = size[2];
  params.z_stride = stride;
  params.keys = reinterpret_cast<const int16_t*>(keys);
  params.counts = reinterpret_cast<int32_t*>(parts[0]);
  params.sums = reinterpret_cast<float*>(parts[1]);
  return params;
}

// Of blocks, parts and codes; `parts` is of errors, counts and sums.
msvq::QuantizeHopperTotals quantize_hopper_totals(std::array<Pointer, 3> parts,
                                                  std::array<int, 3> size, double factor,
                                                  std::array<Pointer, 3> totals) {
  msvq::QuantizeHopperTotals t{};
  t.blocks = size[0];
  t.parts = size[1];
  t.num_codes = size[2];
  t.errors = reinterpret_cast<const double*>(parts[0]);
  t.part_counts = reinterpret_cast<const int32_t*>(parts[1]);
  t.part_sums = reinterpret_cast<const float*>(parts[2]);
  t.factor = factor;
  t.loss = reinterpret_cast<float*>(totals[0]);
  t.counts = reinterpret_cast<int64_t*>(totals[1]);
  t.sums = reinterpret_cast<float*>(totals[2]);
  return t;
}

#ifdef __GLIBC__
// False where the kernel does not take these images.
bool gaussian_pyramid_on_host(Pointer x, Pointer once, Pointer twice, int type,
                              std::array<int64_t, 3> size, const std::vector<float>& taps,
                              int border, int64_t processors, int order) {
  const msvq::GaussianBlurParams params = blur_params(x, once, type, size, taps, border);
  const auto out = reinterpret_cast<void*>(twice);
  if (!msvq::cuda::is_banded_twice(params, out)) return false;
  msvq::gaussian_pyramid_hopper_on_host(params, out, processors, order);
  return true;
}

void vector_quantize_hopper_on_host(Pointer z, int type, std::array<int, 2> size,
                                    std::array<int, 2> strides, Pointer codebook, Pointer codes,
                                    Pointer keys, Pointer z_q, std::array<Pointer, 3> parts,
                                    int blocks, int order) {
  msvq::vector_quantize_hopper_on_host(
      quantize_hopper_params(z, type, size, strides, codebook, codes, keys, z_q, parts), blocks,
      order);
}

void sum_rows_hopper_on_host(Pointer z, int type, std::array<int, 3> size, int stride, Pointer keys,
                             std::array<Pointer, 2> parts, int order) {
  msvq::sum_rows_hopper_on_host(quantize_hopper_sums(z, type, size, stride, keys, parts), order);
}

void total_hopper_on_host(std::array<Pointer, 3> parts, std::array<int, 3> size, double factor,
                          std::array<Pointer, 3> totals) {
  msvq::total_hopper_on_host(quantize_hopper_totals(parts, size, factor, totals));
}
#endif

#ifdef MSVQ_HOPPER
bool gaussian_pyramid(Pointer x, Pointer once, Pointer twice, int type, std::array<int64_t, 3> size,
                      const std::vector<float>& taps, int border, int device, Pointer stream) {
  const msvq::GaussianBlurParams params = blur_params(x, once, type, size, taps, border);
  const auto out = reinterpret_cast<void*>(twice);
  if (!msvq::cuda::is_banded_twice(params, out)) return false;
  check_started(msvq::gaussian_pyramid_hopper(params, out, device, reinterpret_cast<void*>(stream)),
                "gaussian_pyramid");
  return true;
}

void vector_quantize_hopper(Pointer z, int type, std::array<int, 2> size,
                            std::array<int, 2> strides, Pointer codebook, Pointer codes,
                            Pointer keys, Pointer z_q, std::array<Pointer, 3> parts, int blocks,
                            int device, Pointer stream) {
  check_started(
      msvq::vector_quantize_hopper(
          quantize_hopper_params(z, type, size, strides, codebook, codes, keys, z_q, parts), blocks,
          device, reinterpret_cast<void*>(stream)),
      "vector_quantize");
}

void sum_rows_hopper(Pointer z, int type, std::array<int, 3> size, int stride, Pointer keys,
                     std::array<Pointer, 2> parts, int device, Pointer stream) {
  check_started(msvq::sum_rows_hopper(quantize_hopper_sums(z, type, size, stride, keys, parts),
                                      device, reinterpret_cast<void*>(stream)),
                "vector_quantize");
}

void total_hopper(std::array<Pointer, 3> parts, std::array<int, 3> size, double factor,
                  std::array<Pointer, 3> totals, int device, Pointer stream) {
  check_started(msvq::total_hopper(quantize_hopper_totals(parts, size, factor, totals), device,
                                   reinterpret_cast<void*>(stream)),
                "vector_quantize");
}
#endif

}  // namespace

void bind_hopper(py::module_& m) {
  m.attr("hopper_most_sums") = msvq::kMostSums;
#ifdef __GLIBC__
  m.def("gaussian_pyramid_on_host", &gaussian_pyramid_on_host, py::arg("x"), py::arg("once"),
        py::arg("twice"), py::arg("type"), py::arg("size"), py::arg("taps"), py::arg("border"),
        py::arg("processors"), py::arg("order"));
  m.def("vector_quantize_hopper_on_host", &vector_quantize_hopper_on_host, py::arg("z"),
        py::arg("type"), py::arg("size"), py::arg("strides"), py::arg("codebook"), py::arg("codes"),
        py::arg("keys"), py::arg("z_q"), py::arg("parts"), py::arg("blocks"), py::arg("order"));
  m.def("sum_rows_hopper_on_host", &sum_rows_hopper_on_host, py::arg("z"), py::arg("type"),
        py::arg("size"), py::arg("stride"), py::arg("keys"), py::arg("parts"), py::arg("order"));
  m.def("total_hopper_on_host", &total_hopper_on_host, py::arg("parts"), py::arg("size"),
        py::arg("factor"), py::arg("totals"));
#endif
#ifdef MSVQ_HOPPER
  m.def("gaussian_pyramid_hopper", &gaussian_pyramid, py::arg("x"), py::arg("once"),
        py::arg("twice"), py::arg("type"), py::arg("size"), py::arg("taps"), py::arg("border"),
        py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("vector_quantize_hopper", &vector_quantize_hopper, py::arg("z"), py::arg("type"),
        py::arg("size"), py::arg("strides"), py::arg("codebook"), py::arg("codes"), py::arg("keys"),
        py::arg("z_q"), py::arg("parts"), py::arg("blocks"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
  m.def("sum_rows_hopper", &sum_rows_hopper, py::arg("z"), py::arg("type"), py::arg("size"),
        py::arg("stride"), py::arg("keys"), py::arg("parts"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
  m.def("total_hopper", &total_hopper, py::arg("parts"), py::arg("size"), py::arg("factor"),
        py::arg("totals"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
#endif
}
