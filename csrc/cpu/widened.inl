// 16 bits in memory, float32 where it is multiplied: what a thread copies, and the packed weights. For
// processors without products of such elements: M is what is in memory.

template <class M>
struct Widened : M {
  using T = typename M::T;
  using reg = Vec::reg;
  using Operand = float;
  static constexpr int KU = F32::KU, MR = F32::MR, NV = F32::NV;
  static reg broadcast(const Operand* p) { return F32::broadcast(p); }
  static reg load_b(const Operand* p) { return F32::load_b(p); }
  static reg dot(reg acc, reg a, reg b) { return F32::dot(acc, a, b); }
  static reg step(const T* const* rows, int64_t at) { return rows[0] ? M::load(rows[0] + at) : Vec::zero(); }
  static reg step(const T* const* rows, int64_t at, Vec::mask m) {
    return rows[0] ? M::load(rows[0] + at, m) : Vec::zero();
  }
  static reg steps(const T* p, int64_t count) { return M::load(p, Vec::first(count)); }
  static reg steps(const float* p, int64_t count) { return M::rounded(Vec::load(p, Vec::first(count))); }
};
