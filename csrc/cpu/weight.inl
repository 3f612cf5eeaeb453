// Reading a weight that may be wide, rounded as a cast of the whole of it would round; but whole
// registers take what is below the normal range for zero, as the products that read them do.

static inline void ask(const void* p) { __builtin_prefetch(p); }
static inline void ask_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class E>
static typename E::T element(const Weight& weight, int64_t at) {
  return weight.wide ? E::narrow_one(static_cast<const float*>(weight.data)[at])
                     : static_cast<const typename E::T*>(weight.data)[at];
}

// The same as it is multiplied.
template <class E>
static typename E::Operand operand(const Weight& weight, int64_t at) {
  if constexpr (std::is_same_v<typename E::Operand, typename E::T>) return element<E>(weight, at);
  else return E::widen_one(element<E>(weight, at));
}

// So many elements that lie side by side, at most two registers of them: where they are, or in `room`.
// The ones that lie `ahead` are asked of the memory.
template <class E>
static const typename E::T* elements(const Weight& weight, int64_t at, int64_t count, int64_t ahead,
                                     typename E::T* room) {
  using T = typename E::T;
  if (!weight.wide) {
    const T* from = static_cast<const T*>(weight.data) + at;
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) ask(from + i + ahead);
    return from;
  }
  const float* from = static_cast<const float*>(weight.data) + at;
  for (int64_t i = 0; i < count; i += Vec::W) {
    ask(from + i + ahead);
    E::store(room + i, Vec::load(from + i, Vec::first(count - i)));
  }
  return room;
}

// So many steps of input channels side by side, at most W, in the lanes of a register.
template <class E>
static Vec::reg steps(const Weight& weight, int64_t at, int64_t count) {
  constexpr int64_t AHEAD = 4 * Vec::W * E::KU;
  if (!weight.wide) {
    const auto* from = static_cast<const typename E::T*>(weight.data) + at;
    ask(from + AHEAD);
    return E::steps(from, count);
  }
  const float* from = static_cast<const float*>(weight.data) + at;
  for (int64_t i = 0; i < count * E::KU; i += Vec::W) ask(from + i + AHEAD);
  return E::steps(from, count);
}
