// What this build offers, in no order of preference.

constexpr ConvAlgorithm algorithms[] = {Winograd<Element, Wino4>::algorithm,
                                        Winograd<Element, Wino2>::algorithm,
                                        Direct<Element>::algorithm,
#ifdef RF_BF16
                                        Direct<Element, true>::algorithm,
#endif
                                        {}};
constexpr WeightGradient weight_gradients[] = {
    weight_gradient<WinogradBackwardWeight<Element, Wino4>>(Wino4::name),
    weight_gradient<DirectBackwardWeight<Element>>("direct"),
    {}};
constexpr KernelTable table{algorithms, weight_gradients, max_pool<Element>, head<Element>};
