// The pybind11 module `slmkernels._host`: what the native build is, what this CPU can do, which tier is in
// use, and the window geometry of common/band.h for exhaustive tests against numpy.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "common/band.h"
#include "common/isa.h"
#include "common/poison.h"

namespace py = pybind11;

namespace {

constexpr slm::Isa kTiers[] = {slm::Isa::portable, slm::Isa::avx2, slm::Isa::avx512};

py::tuple as_tuple(slm::Range r) { return py::make_tuple(r.begin, r.end); }

// left: a number, None, or (W,) for blocks of W.
slm::Band band(py::object left, py::object right) {
    const auto side = [](const py::object& x) {
        return x.is_none() ? slm::Band::kUnbounded : x.cast<int64_t>();
    };
    if (!py::isinstance<py::tuple>(left)) return {side(left), side(right)};
    const int64_t block = left.cast<py::tuple>()[0].cast<int64_t>();
    return {block - 1, side(right), block};
}

void set_isa(const std::string& name) {
    for (slm::Isa tier : kTiers)
        if (name == slm::isa_name(tier)) {
            if (!slm::set_isa(tier)) throw py::value_error("isa is '" + name + "'; this CPU does not run it");
            return;
        }
    throw py::value_error("isa is '" + name + "'; expected portable, avx2 or avx512");
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Build facts, CPU features, instruction-set tier and window geometry.";
    m.def("build_facts",
          [] { return std::string("built with " SLM_COMPILER ", stable ABI of torch " SLM_TORCH_TARGET); });
    m.def("isa_supported", [] {
        std::vector<std::string> names;
        for (slm::Isa tier : kTiers)
            if (slm::isa_supported(tier)) names.emplace_back(slm::isa_name(tier));
        py::list list;
        for (const auto& name : names) list.append(name);
        return list;
    });
    m.def("has_bf16_dot", &slm::has_bf16_dot, "AVX512-BF16 dot products?");
    m.def("get_isa", [] { return std::string(slm::isa_name(slm::get_isa())); });
    m.def("set_isa", &set_isa, py::arg("isa"), "Use tier 'portable', 'avx2' or 'avx512'.");
    m.def(
        "isa_complaint", [] { return std::string(slm::isa_complaint()); },
        "Why SLMKERNELS_CPU_ISA was not followed, or an empty string.");
    m.def("get_poisoned", &slm::get_poisoned);
    m.def("set_poisoned", &slm::set_poisoned, py::arg("on"), "Fill the operators' new memory with NaN?");
    m.def("band_keys", [](py::object left, py::object right, int64_t begin, int64_t end, int64_t S) {
        return as_tuple(band(left, right).keys({begin, end}, S));
    });
    m.def("band_queries",
          [](py::object left, py::object right, int64_t begin, int64_t end, int64_t first, int64_t last) {
              return as_tuple(band(left, right).queries({begin, end}, {first, last}));
          });
    m.def("band_full", [](py::object left, py::object right, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        return band(left, right).full({i0, i1}, {j0, j1});
    });
    m.def(
        "band_runs",
        [](py::object left, py::object right, int64_t i0, int64_t lanes, int64_t width, int64_t step,
           int64_t begin, int64_t end) {
            py::list runs;
            for (int64_t j = begin; j < end;) {
                const slm::Run run = slm::next_run(band(left, right), i0, lanes, width, step, j, end);
                runs.append(py::make_tuple(as_tuple(run.j), as_tuple(run.v), run.masked));
                j = run.j.end;
            }
            return runs;
        },
        "Runs of keys [begin, end): ((j, j_end), (first vector, past the last), masked).");
}
