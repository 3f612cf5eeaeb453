// Memory for outputs, lent to torch and used again once nobody holds the tensor that lived in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace rf {

// Memory that is cut into blocks of any size, each where the first gap has room. Blocks come back from
// whatever thread drops a tensor.
class Chunk {
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> memory_;
  std::mutex mutex_;
  std::map<size_t, size_t> gaps_;  // from where to where, no two of them next to each other

 public:
  const size_t nbytes;

  explicit Chunk(size_t nbytes);  // std::bad_alloc where the system has no more
  char* data() const { return memory_.get(); }
  std::optional<size_t> take(size_t nbytes);  // where the block begins; nothing where no gap has room
  void give_back(size_t begin, size_t nbytes);
  bool unused();
};

// The memory of one thread.
class Memory {
  std::vector<std::shared_ptr<Chunk>> chunks_;
  const size_t chunk_bytes_, most_bytes_;

 public:
  struct Block {
    std::shared_ptr<Chunk> chunk;
    size_t begin, nbytes;
    char* data() const { return chunk->data() + begin; }
  };

  // chunk_bytes are taken at once, at least, and most_bytes kept at most.
  Memory(size_t chunk_bytes, size_t most_bytes)
      : chunk_bytes_(chunk_bytes), most_bytes_(most_bytes) {}
  size_t total() const;
  // A block that nobody holds, in whole pages; nothing past the limit.
  std::optional<Block> take(size_t nbytes);
};

}  // namespace rf
