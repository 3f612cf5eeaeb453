#include "memory.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>

namespace rf {

namespace py = pybind11;

constexpr size_t kPage = 4096;

void Chunk::Free::operator()(char* p) const { std::free(p); }

Chunk::Chunk(size_t bytes)
    : memory_(static_cast<char*>(std::aligned_alloc(kPage, bytes))), gaps_{{0, bytes}}, nbytes(bytes) {
  if (!memory_) throw std::bad_alloc();
}

std::optional<size_t> Chunk::take(size_t size) {
  const std::lock_guard lock(mutex_);
  for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
    const auto [begin, end] = *gap;
    if (end - begin < size) continue;
    gaps_.erase(gap);
    if (end - begin > size) gaps_.emplace(begin + size, end);
    return begin;
  }
  return std::nullopt;
}

void Chunk::give_back(size_t begin, size_t size) {
  const std::lock_guard lock(mutex_);
  size_t end = begin + size;
  auto after = gaps_.lower_bound(begin);
  if (after != gaps_.begin()) {
    const auto before = std::prev(after);
    if (before->second == begin) {
      begin = before->first;
      gaps_.erase(before);
    }
  }
  if (after != gaps_.end() && after->first == end) {
    end = after->second;
    gaps_.erase(after);
  }
  gaps_.emplace(begin, end);
}

bool Chunk::unused() {
  const std::lock_guard lock(mutex_);
  return gaps_.size() == 1 && gaps_.begin()->first == 0 && gaps_.begin()->second == nbytes;
}

size_t Memory::total() const {
  size_t sum = 0;
  for (const auto& chunk : chunks_) sum += chunk->nbytes;
  return sum;
}

std::optional<Memory::Block> Memory::take(size_t nbytes) {
  if (nbytes > most_bytes_) return std::nullopt;
  const size_t size = (nbytes + kPage - 1) / kPage * kPage;
  for (const auto& chunk : chunks_)
    if (const auto begin = chunk->take(size)) return Block{chunk, *begin, size};
  // Each was just asked and had no room, so that what is unused is too small.
  if (total() + size > most_bytes_)
    chunks_.erase(std::remove_if(chunks_.begin(), chunks_.end(), [](const auto& c) { return c->unused(); }),
                  chunks_.end());
  const size_t room = std::min(std::max(chunk_bytes_, size), most_bytes_ - std::min(most_bytes_, total()));
  if (room < size) return std::nullopt;
  chunks_.push_back(std::make_shared<Chunk>(room / kPage * kPage));
  return Block{chunks_.back(), *chunks_.back()->take(size), size};
}

// What DLPack, by which torch takes memory of others, says of a tensor (version 0, a stable ABI).
struct DLDevice { int32_t type, id; };
struct DLDataType { uint8_t code, bits; uint16_t lanes; };
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kCpu = 1;

namespace {

// A block in use. torch deletes it with the last tensor that reads it, in whatever thread.
struct Lent : DLManagedTensor {
  Memory::Block block;
  std::array<int64_t, 4> sizes, apart;

  Lent(Memory::Block taken, std::array<int64_t, 4> nchw, bool channels_last, DLDataType dtype)
      : DLManagedTensor{}, block(std::move(taken)), sizes(nchw) {
    const auto [n, c, h, w] = nchw;
    apart = channels_last ? std::array<int64_t, 4>{c * h * w, 1, w * c, c}
                          : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
    tensor = {block.data(), {kCpu, 0}, 4, dtype, sizes.data(), apart.data(), 0};
    deleter = [](DLManagedTensor* self) { delete static_cast<Lent*>(self); };
  }
  ~Lent() { block.chunk->give_back(block.begin, block.nbytes); }
};

// The tensor's bytes, none where there are too many to count.
std::optional<size_t> bytes_of(const std::array<int64_t, 4>& sizes, size_t itemsize) {
  size_t bytes = itemsize;
  for (const int64_t side : sizes)
    if (side < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(side), &bytes)) return std::nullopt;
  return bytes;
}

constexpr const char* kFresh = "dltensor";  // until torch has taken it

py::object lend(Memory& memory, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, int code,
                int bits) {
  const std::array<int64_t, 4> sizes{n, c, h, w};
  const auto bytes = bytes_of(sizes, bits / 8);
  auto block = bytes && *bytes ? memory.take(*bytes) : std::nullopt;
  if (!block) return py::none();
  const DLDataType dtype{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  auto lent = std::make_unique<Lent>(std::move(*block), sizes, channels_last, dtype);
  PyObject* capsule = PyCapsule_New(static_cast<DLManagedTensor*>(lent.get()), kFresh, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, kFresh)) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, kFresh));
    managed->deleter(managed);
  });
  if (!capsule) throw py::error_already_set();
  lent.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void register_memory(py::module_& m) {
  py::class_<Memory>(m, "Memory")
      .def(py::init<size_t, size_t>(), py::arg("chunk_bytes"), py::arg("most_bytes"))
      .def_property_readonly("total", &Memory::total)
      .def("lend", &lend, py::arg("n"), py::arg("c"), py::arg("h"), py::arg("w"), py::arg("channels_last"),
           py::arg("code"), py::arg("bits"));
}

}  // namespace rf
