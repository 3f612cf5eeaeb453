// What this build offers, in no order of preference.

constexpr ConvAlgorithm algorithms[] = {Winograd<Element, Wino4>::algorithm,
                                        Winograd<Element, Wino2>::algorithm,
                                        Direct<Element>::algorithm,
#ifdef RF_BF16
                                        Direct<Element, true>::algorithm,
#endif
                                        {}};
using WeightGradient = ConvBackwardWeight<Element, Wino4>;
constexpr KernelTable table{algorithms, WeightGradient::scratch_bytes, WeightGradient::run,
                            max_pool<Element>, head<Element>};
