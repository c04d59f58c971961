// msvq_fast._C: raw pointers and sizes in, no torch header; Python has checked every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "gaussian_blur/gaussian_blur.h"

namespace py = pybind11;

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

void gaussian_blur_cpu(Pointer x, Pointer out, int type, std::array<int64_t, 4> size,
                       const std::vector<float>& taps_y, const std::vector<float>& taps_x,
                       int border, bool adjoint, int threads, const std::string& isa) {
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
  params.threads = threads;
  msvq::gaussian_blur(isa_named(isa), params);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isas", &cpu_isas, "Instruction sets this processor runs, best last");
  m.def("gaussian_blur_cpu", &gaussian_blur_cpu, py::arg("x"), py::arg("out"), py::arg("type"),
        py::arg("size"), py::arg("taps_y"), py::arg("taps_x"), py::arg("border"),
        py::arg("adjoint"), py::arg("threads"), py::arg("isa") = "",
        py::call_guard<py::gil_scoped_release>());
}
