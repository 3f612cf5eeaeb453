// The training kernels of this build.

template <class E>
constexpr TrainingTable training_table{bn_stats<E>,
                                       bn_scale_shift,
                                       bn_gradient_vectors,
                                       bn_act<E>,
                                       bn_act_backward_reduce<E>,
                                       bn_act_backward_apply<E>,
                                       add_relu<E>,
                                       max_pool_index<E>,
                                       max_pool_backward<E>};
