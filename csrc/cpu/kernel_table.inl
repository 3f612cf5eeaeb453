// What this build offers, best general choice last.

constexpr ConvAlgorithm algorithms[] = {Direct<Element>::algorithm, {}};
constexpr KernelTable table{algorithms, nullptr, nullptr};
