// The pybind11 module: how it was built, and host functions that take no tensors. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "core/arguments.h"
#include "core/exact_row.h"
#include "core/philox.h"
#include "cpu/launch.h"
#include "cuda/launch.h"
#include "cuda/row_plan.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream stream(list);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ALUM_VERSION;
  info["compiler"] = ALUM_COMPILER;
  info["torch_target"] = ALUM_TORCH_TARGET;
  info["torch_built_with"] = ALUM_TORCH_BUILT_WITH;
  info["cuda_compiler"] = ALUM_CUDA_COMPILER;
  info["cuda_architectures"] = split(alum::cuda::architectures());
  info["cuda_stream_resolved"] = alum::cuda::stream_resolved();
  info["cpu_capability"] = alum::cpu::capability();
  return info;
}

std::array<uint32_t, 4> philox(uint64_t seed, std::array<uint32_t, 4> counter) {
  const alum::Words<uint32_t> words = alum::philox<uint32_t>(seed, {counter[0], counter[1], counter[2], counter[3]});
  return {words.x0, words.x1, words.x2, words.x3};
}

float elementary(const std::string& name, float x) {
  if (name == "exp") return alum::exp(x);
  if (name == "g_series") return alum::g_series(x);
  if (name == "log") return alum::log(x);
  if (name == "log1p") return alum::log1p(x);
  if (name == "cos_quarter") return alum::cos_quarter(x);
  if (name == "sin_quarter") return alum::sin_quarter(x);
  throw py::value_error("name: no elementary function " + name);
}

int64_t row_offset(int64_t n, int64_t inner, int64_t stride_outer, int64_t stride_inner) {
  return alum::RowStrides{inner, stride_outer, stride_inner}.offset(n);
}

py::dict row_plan(int64_t columns, int element_bytes, int64_t rows, int capability, int64_t shared_per_block,
                  int multiprocessors, bool linear) {
  if (columns < 1) throw py::value_error("columns: expected at least 1, got " + std::to_string(columns));
  if (element_bytes != 2 && element_bytes != 4) {
    throw py::value_error("element_bytes: expected 2 or 4, got " + std::to_string(element_bytes));
  }
  using alum::cuda::RowPath;
  const alum::cuda::Machine machine{capability, shared_per_block, multiprocessors};
  const alum::cuda::RowPlan plan = linear ? alum::cuda::plan_long_rows(columns, element_bytes, rows, machine)
                                          : alum::cuda::plan_rows(columns, element_bytes, rows, machine);
  py::dict facts;
  facts["path"] = plan.path == RowPath::kTile ? "tile" : plan.path == RowPath::kStaged ? "staged" : "streamed";
  facts["threads"] = plan.threads;
  facts["blocks_per_row"] = plan.blocks_per_row;
  facts["rows_per_block"] = plan.rows_per_block;
  facts["side_bytes"] = plan.side_bytes;
  facts["shared_bytes"] = plan.shared_bytes;
  facts["resident"] = plan.resident;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of alum_kernels: build facts, and the arithmetic that host and device share.";
  m.def("build_info", &build_info, "How this module was built and what it found at load time.");
  m.def("philox", &philox, py::arg("seed"), py::arg("counter"), "Philox4x32-10 words of one counter.");
  m.def("elementary", &elementary, py::arg("name"), py::arg("x"), "One of the fp32 functions of core/elementary.h.");
  m.def("row_offset", &row_offset, py::arg("row"), py::arg("inner"), py::arg("stride_outer"), py::arg("stride_inner"),
        "Element offset of a row of (O, I, V) logits, as every kernel computes it.");
  m.def("row_plan", &row_plan, py::arg("columns"), py::arg("element_bytes"), py::arg("rows"), py::arg("capability"),
        py::arg("shared_per_block"), py::arg("multiprocessors"), py::arg("linear") = false,
        "How the CUDA kernels lay out rows of logits (linear: of a head's products) on a device of such a capability "
        "(90 for 9.0), shared memory a block (bytes) and number of multiprocessors: csrc/cuda/row_plan.h.");
}
