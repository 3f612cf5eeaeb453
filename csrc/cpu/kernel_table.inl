// What this build offers, best general choice last.

constexpr ConvAlgorithm algorithms[] = {Winograd<Element, Wino4>::algorithm,
                                        Winograd<Element, Wino2>::algorithm,
                                        Direct<Element>::algorithm, {}};
constexpr KernelTable table{algorithms, nullptr, nullptr};
