// What this build offers for an element type, in no order of preference.

template <class E>
constexpr ConvAlgorithm algorithms[] = {Winograd<E, Wino4>::algorithm,
                                        Winograd<E, Wino2>::algorithm,
                                        Direct<E>::algorithm,
#ifdef RF_BF16
                                        Direct<E, true>::algorithm,
#endif
                                        {}};
template <class E>
constexpr WeightGradient weight_gradients[] = {
    weight_gradient<WinogradBackwardWeight<E, Wino4>>(Wino4::name),
    weight_gradient<DirectBackwardWeight<E>>("direct"),
    {}};
template <class E>
constexpr KernelTable kernel_table{algorithms<E>, weight_gradients<E>, max_pool<E>, head<E>};
